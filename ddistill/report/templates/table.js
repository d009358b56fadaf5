// Tables that sort by their headings, the filter by name, and the choice of what is shown.
function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => {
    const cell = row.cells[i], text = (cell.dataset.value ?? cell.textContent).trim();
    if (text === "" || text === "–") return null;
    return Number.isNaN(Number(text)) ? text : Number(text);
  };
  heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [key(row, i), row]);
    const order = ([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is missing stays last
      const numbers = typeof a === "number" && typeof b === "number";
      const sign = numbers ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return descending ? -sign : sign;
    };
    body.append(...rows.sort(order).map(([, row]) => row));
    say(`Sorted by ${head.innerText.trim()}, ${head.getAttribute("aria-sort")}`);
  }));
}

function chooser() {
  const chips = document.getElementById("chips"), filter = document.getElementById("filter");
  if (!chips) return;
  const boxes = new Map();
  for (const name of data.students) {
    const box = element("input", { type: "checkbox" });
    box.addEventListener("change", () => show([name], box.checked));
    const chip = element("label", {}, box, element("span", { class: "chip" }, swatch(name), name));
    boxes.set(name, [box, chip]);
    chips.append(chip);
  }
  const matches = () => data.students.filter((name) => name.toLowerCase().includes(filter.value.trim().toLowerCase()));
  const update = () => {
    for (const [name, [box, chip]] of boxes) {
      box.checked = shown.has(name);
      paintSwatch(chip.querySelector(".swatch"), name);
    }
    for (const row of document.querySelectorAll("tr[data-name], article[data-name]"))
      paintSwatch(row.querySelector(".swatch"), row.dataset.name);
    document.getElementById("shown-count").textContent = `${shown.size} of ${data.students.length}`;
  };
  filter.addEventListener("input", () => {
    const kept = new Set(matches());
    for (const [name, [, chip]] of boxes) chip.hidden = !kept.has(name);
    for (const row of document.querySelectorAll("tr[data-name], article[data-name]"))
      row.hidden = boxes.has(row.dataset.name) && !kept.has(row.dataset.name);
    document.getElementById("show-match").textContent = filter.value ? `Show these ${kept.size}` : "Show all";
    say(`${kept.size} of ${data.students.length} match`);
  });
  document.getElementById("show-match").addEventListener("click", () => show(matches()));
  document.getElementById("show-none").addEventListener("click", () => show(data.students, false));
  document.addEventListener("shown", update);
}

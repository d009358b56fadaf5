// The theme, the copying of commands, and the start of all parts.
function themes() {
  const stored = (value) => {
    try { // a page from disk may be denied its storage
      if (value === undefined) return localStorage.getItem("ddistill-theme");
      localStorage.setItem("ddistill-theme", value);
    } catch { /* the choice then lasts as long as the page */ }
    return null;
  };
  const set = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    document.dispatchEvent(new Event("theme"));
  };
  const radios = [...document.querySelectorAll('input[name="theme"]')];
  for (const radio of radios) radio.addEventListener("change", () => { set(radio.value); stored(radio.value); });
  const before = radios.find((radio) => radio.value === stored());
  if (before) { before.checked = true; set(before.value); }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));
}

function copying() {
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
        say("Copied");
      } catch { // pages from disk may not write to the clipboard in some browsers
        getSelection().selectAllChildren(code);
        say("Selected: copy with the keyboard");
      }
    });
  }
}

themes();
copying();
document.querySelectorAll("table.sortable").forEach(sortable);
chooser();
show(data.students.slice(0, data.students.length > 10 ? FIRST_SHOWN : 10)); // one or two more are no clutter
document.querySelectorAll("[data-group]").forEach((section) => {
  const group = data.groups[section.dataset.group];
  section.querySelectorAll("[data-viewer]").forEach((root) => viewer(root, group));
  section.querySelectorAll("[data-motion]").forEach((root) => motionView(root, group));
  section.querySelectorAll("[data-plot]").forEach((figure) => qualityPlot(figure, group));
});
document.querySelectorAll('[data-plot="loss"]').forEach(lossPlot);
document.documentElement.dataset.ready = "true";

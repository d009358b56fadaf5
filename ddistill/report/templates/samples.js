// Samples of one sampler at a time, beside another's from the same noise, with a slider over their cost.

// The sheet nearest below the wanted cost, or the cheapest there is.
function sheetAt(drawn, wanted) {
  const costs = Object.keys(drawn.steps).map(Number).sort((a, b) => a - b);
  const cost = costs.filter((n) => n <= wanted).pop() ?? costs[0];
  return [cost, drawn.steps[cost]];
}

function describe(group, drawn, cost, sheet) {
  const kind = sheet.src ? "images" : "points";
  const lost = sheet.lost.length ? `, ${sheet.lost.length} of ${group.modes} modes lost` : "";
  return `${sheet.n} ${kind} from ${drawn.label}${cost ? ` with ${calls(cost)}` : ""}${lost}`;
}

function caption(group, drawn, cost, sheet) {
  const parts = [element("b", {}, drawn.label)];
  const words = [];
  if (cost) words.push(calls(cost));
  if (sheet.lost.length) {
    const of = group.modes ? ` of ${group.modes}` : "";
    words.push(element("span", { class: "lost" }, `${sheet.lost.length}${of} modes lost`));
  }
  if (sheet.outside) words.push(`${sheet.outside} outside the frame`);
  return [...parts, ...words.flatMap((word, i) => (i ? [", ", word] : [word]))];
}

function fillSheet(box, group, drawn, cost, sheet) {
  const text = describe(group, drawn, cost, sheet);
  if (sheet.src) {
    let image = box.querySelector("img");
    if (!image) box.replaceChildren((image = element("img", {})));
    image.className = sheet.pixelated ? "pixelated" : "";
    image.width = sheet.width;
    image.height = sheet.height;
    image.alt = text;
    image.src = sheet.src;
    return;
  }
  let canvas = box.querySelector("canvas");
  if (!canvas) {
    box.replaceChildren((canvas = element("canvas", { role: "img" })));
    watchSize(canvas);
  }
  canvas.setAttribute("aria-label", text);
  canvas.draw = () => paintPoints(canvas, group, positions(sheet.points), sheet.lost);
  canvas.draw();
}

// Canvases are drawn again when their size or the theme changes.
const resized = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.draw?.()));
const watchSize = (canvas) => resized.observe(canvas);
document.addEventListener("theme", () => document.querySelectorAll("canvas").forEach((canvas) => canvas.draw?.()));

// A canvas ready to be drawn on, and the scale from the frame's half side to its pixels.
function clean(canvas) {
  const side = Math.round(canvas.clientWidth * (window.devicePixelRatio || 1));
  if (!side) return null;
  if (canvas.width !== side) canvas.width = canvas.height = side;
  const pen = canvas.getContext("2d");
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, side, side);
  return { pen, half: side / 2, unit: Math.max(1, side / 320) };
}

function paintCentres({ pen, half, unit }, canvas, group, lost) {
  const [mx, my, size] = group.frame, missing = new Set(lost);
  group.centres.forEach(([a, b], k) => {
    const x = half * (1 + (a - mx) / size), y = half * (1 - (b - my) / size), gone = missing.has(k);
    pen.strokeStyle = colourOf(canvas, gone ? "--lost" : "--soft");
    pen.lineWidth = (gone ? 2 : 1) * unit;
    const arm = 4 * unit;
    pen.beginPath();
    pen.moveTo(x - arm, y); pen.lineTo(x + arm, y); pen.moveTo(x, y - arm); pen.lineTo(x, y + arm);
    if (gone) { pen.moveTo(x + 8 * unit, y); pen.arc(x, y, 8 * unit, 0, 2 * Math.PI); }
    pen.stroke();
  });
}

function paintPoints(canvas, group, xy, lost) {
  const to = clean(canvas);
  if (!to) return;
  const { pen, half, unit } = to, n = xy.length / 2;
  pen.fillStyle = colourOf(canvas, "--c0");
  pen.globalAlpha = Math.min(0.85, Math.max(0.3, 260 / n));
  const dot = 1.7 * unit;
  for (let i = 0; i < n; i += 1) {
    pen.beginPath();
    pen.arc(half * (1 + xy[2 * i]), half * (1 - xy[2 * i + 1]), dot, 0, 2 * Math.PI);
    pen.fill();
  }
  pen.globalAlpha = 1;
  paintCentres(to, canvas, group, lost);
}

// Radio buttons for what may stand on the left: arrow keys switch between them in place.
let switches = 0;
function switcher(fieldset, list, choose) {
  const name = `switch-${(switches += 1)}`;
  const legend = fieldset.querySelector("legend");
  let chosen = null;
  const rebuild = () => {
    const entries = list();
    if (!entries.includes(chosen)) chosen = entries.find((one) => one.kind === "student") ?? entries[0] ?? null;
    fieldset.replaceChildren(legend, ...entries.map((one) => {
      const input = element("input", { type: "radio", name, checked: one === chosen });
      input.addEventListener("change", () => { chosen = one; choose(one); });
      return element("label", {}, input, element("span", { class: "chip" }, swatch(one.label), one.label));
    }));
    choose(chosen);
  };
  document.addEventListener("shown", rebuild);
  rebuild();
}

const isShown = (one) => one.kind !== "student" || shown.has(one.label);

// A list of samplers for the right side: by default the first teacher.
function besideChoice(select, entries, choose) {
  entries.forEach((one, i) => select.append(element("option", { value: String(i) }, one.label)));
  select.value = String(Math.max(0, entries.findIndex((one) => one.kind === "teacher")));
  select.addEventListener("change", () => choose(entries[select.value]));
  return entries[select.value];
}

function viewer(root, group) {
  const slider = root.querySelector(".steps"), output = root.querySelector("output"), gallery = root.querySelector(".gallery");
  const sides = [".left", ".right"].map((name) => root.querySelector(name));
  const students = group.drawn.filter((one) => one.kind === "student");
  const costs = [...new Set((students.length ? students : group.drawn).flatMap((one) => Object.keys(one.steps).map(Number)))];
  costs.sort((a, b) => a - b);
  slider.max = costs.length - 1;
  slider.disabled = costs.length < 2;
  let left = null, right = null;
  const wanted = () => costs[slider.value];
  const fill = (side, one, announce) => {
    if (!one) return side.querySelector(".sheet").replaceChildren();
    const [cost, sheet] = sheetAt(one, wanted());
    fillSheet(side.querySelector(".sheet"), group, one, cost, sheet);
    side.querySelector("figcaption").replaceChildren(...caption(group, one, cost, sheet));
    if (announce) say(describe(group, one, cost, sheet));
  };
  const cards = new Map(group.drawn.map((one) => {
    const card = element("figure", {}, element("div", { class: "sheet" }), element("figcaption"));
    return [one, { card, filled: false }];
  }));
  const layOut = () => {
    const now = group.drawn.filter(isShown);
    gallery.replaceChildren(...now.map((one) => cards.get(one).card));
    for (const one of now) {
      const entry = cards.get(one);
      if (!entry.filled) whenNear(entry.card, () => { entry.filled = true; fill(entry.card, one); });
    }
  };
  const update = () => {
    output.textContent = String(wanted());
    slider.setAttribute("aria-valuetext", calls(wanted()));
    root.querySelector(".at").textContent = `with ${calls(wanted())}`;
    fill(sides[0], left);
    fill(sides[1], right);
    for (const [one, entry] of cards) if (entry.filled) fill(entry.card, one);
  };
  right = besideChoice(root.querySelector(".beside"), group.drawn, (one) => { right = one; fill(sides[1], right, true); });
  switcher(root.querySelector(".switch"), () => group.drawn.filter(isShown), (one) => { left = one; fill(sides[0], left); });
  slider.addEventListener("input", update);
  document.addEventListener("shown", layOut);
  layOut();
  update();
}

// Plots, by Vega-Lite: its specifications come with the data, the points and their looks from here.
const number = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toString());
const TEACHERS = ["cross", "triangle-down", "diamond", "square"];

function styled(name, kind, index) {
  if (kind !== "student") return { colour: "var(--soft)", shape: TEACHERS[index % TEACHERS.length], dash: [2, 3], opacity: 0.75 };
  if (shown.has(name)) return { ...look(name), opacity: 1 };
  return { colour: "var(--ghost)", shape: "circle", dash: [1, 0], opacity: 0.45, alone: data.students.length > 12 };
}

const titled = (column) => (column.better ? `${column.title} ${column.better > 0 ? "↑" : "↓"}` : column.title);

// Whether a measure is read better on a logarithmic axis.
const wide = (values) => Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);

// Ticks of a logarithmic axis: 1, 2, 5 of each power of ten, or the powers alone where these are many.
function logTicks(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)].map(Math.log10), all = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power += 1)
    for (const lead of high - low > 2 ? [1] : [1, 2, 5]) all.push(Number((lead * 10 ** power).toPrecision(3)));
  return all;
}

// On a logarithmic axis a bar that would reach below zero ends at the smallest value that is shown.
function clipped(points, axis) {
  const lower = `${axis}0`, least = Math.min(...points.map((p) => p[axis]));
  return points.map((p) => (p[lower] <= 0 ? { ...p, [lower]: least } : p));
}

function axisOf(spec, axis, title, values, log) {
  const encoding = spec.encoding[axis];
  encoding.title = title;
  if (!log) return;
  encoding.scale = { type: "log", nice: false };
  encoding.axis = { ...encoding.axis, values: logTicks(values), format: "~g" };
}

function bars(axis, value, spread) {
  return spread === undefined || spread === null ? {} : { [`${axis}0`]: value - spread, [`${axis}1`]: value + spread };
}

function lineTexts(line, columns) {
  const parts = columns.map((c) => {
    const spread = line.spread[c.name];
    return `${c.title} ${number(line.values[c.name])}${spread === undefined || spread === null ? "" : ` ± ${number(spread)}`}`;
  });
  return `${line.label}${line.nfe === null ? "" : `, ${calls(line.nfe)}`}: ${parts.join(", ")}`;
}

function qualityPoints(group, xColumn, yColumn) {
  const teachers = [...new Set(group.lines.filter((line) => line.kind !== "student").map((line) => line.label))];
  const points = [];
  for (const line of group.lines) {
    const x = xColumn ? line.values[xColumn.name] : line.nfe, y = line.values[yColumn.name];
    if (x === null || x === undefined || y === null || y === undefined || (!xColumn && !(x > 0))) continue;
    points.push({
      x, y, name: line.label, order: line.nfe ?? 0, kind: line.kind,
      ...(xColumn ? bars("x", x, line.spread[xColumn.name]) : {}), ...bars("y", y, line.spread[yColumn.name]),
      text: lineTexts(line, xColumn ? [xColumn, yColumn] : [yColumn]),
      ...styled(line.label, line.kind, teachers.indexOf(line.label)),
    });
  }
  // What is shown lies above what is not.
  return points.sort((a, b) => a.opacity - b.opacity);
}

// Where few calls of a teacher are far off they would press all students flat: the frame is that of the students, and
// of whatever lies near it.
function near(points, axis) {
  const values = points.filter((p) => p.kind === "student").map((p) => p[axis]);
  if (!values.length) return null;
  const low = Math.min(...values), high = Math.max(...values), room = 1.5 * (high - low) + 1e-9;
  const all = points.map((p) => p[axis]).filter((v) => v >= low - room && v <= high + room);
  return [Math.min(...all), Math.max(...all)];
}

function draw(box, spec, points) {
  const has = (layer) => !layer.needs || points.some((p) => layer.needs in p); // Vega warns of bars that have no points
  spec.layer = spec.layer.filter(has).map(({ needs, ...layer }) => layer);
  spec.data.values = points;
  if (!points.length) return box.replaceChildren(element("p", { class: "note" }, "Nothing to plot for what is shown."));
  return vegaEmbed(box, spec, { mode: "vega-lite", actions: false, renderer: "svg", ast: true, defaultStyle: false });
}

function options(select, columns, chosen) {
  columns.forEach((c) => select.append(element("option", { value: c.name, selected: c === chosen }, c.title)));
}

const QUALITY = ["frechet", "fid", "sw2", "kid", "cmmd", "accuracy", "precision"];
const VARIETY = ["recall", "coverage", "diversity", "spread"];
const firstOf = (columns, names) => names.map((n) => columns.find((c) => c.name === n)).find(Boolean);

function qualityPlot(figure, group) {
  const cost = figure.dataset.plot === "cost", box = figure.querySelector(".canvas");
  const columns = group.columns.filter((c) => group.lines.some((line) => line.values[c.name] !== null && line.values[c.name] !== undefined));
  const [xSelect, ySelect] = ["x", "y"].map((axis) => figure.querySelector(`[data-axis="${axis}"]`));
  const quality = firstOf(columns, QUALITY) ?? columns[0];
  if (!quality) return figure.remove();
  if (cost) options(ySelect, columns, quality);
  else {
    if (columns.length < 2) return figure.remove();
    const rest = columns.filter((c) => c !== quality);
    options(xSelect, columns, firstOf(columns, ["precision"]) ?? quality);
    options(ySelect, columns, firstOf(rest, VARIETY) ?? rest[0]);
  }
  const update = () => {
    const of = (select) => columns.find((c) => c.name === select.value);
    const x = cost ? null : of(xSelect), y = of(ySelect), spec = structuredClone(data.charts[cost ? "cost" : "trade"]);
    let points = qualityPoints(group, x, y), leftOut = 0;
    const axes = cost ? [["y", y]] : [["x", x], ["y", y]];
    for (const [axis, column] of axes) {
      const range = near(points, axis), log = wide(points.map((p) => p[axis]));
      axisOf(spec, axis, titled(column), points.map((p) => p[axis]), log);
      if (log) points = clipped(points, axis);
      if (range && !log) {
        const cut = points.filter((p) => p[axis] < range[0] || p[axis] > range[1]).length;
        points = points.filter((p) => p[axis] >= range[0] && p[axis] <= range[1]);
        leftOut += cut;
      }
    }
    figure.querySelector(".note").textContent = leftOut ? `${leftOut} point${leftOut > 1 ? "s" : ""} far from all students left out.` : "";
    if (cost) spec.encoding.x.axis = { values: ticks(points), format: "d", grid: false };
    spec.description = `${y.title} against ${x ? x.title : "network calls"}: ${points.length} points`;
    return draw(box, spec, points);
  };
  for (const select of [xSelect, ySelect]) select?.addEventListener("change", update);
  whenNear(figure, () => { update(); document.addEventListener("shown", update); });
}

// Ticks at the costs themselves, the students' first, and others as far as they are apart from these.
function ticks(points) {
  const kept = [], apart = (a, b) => Math.max(a, b) >= 1.35 * Math.min(a, b);
  for (const students of [true, false]) {
    const costs = points.filter((p) => (p.kind === "student") === students).map((p) => p.x);
    for (const v of [...new Set(costs)].sort((a, b) => a - b)) if (kept.every((w) => apart(v, w))) kept.push(v);
  }
  return kept;
}

function lossPlot(figure) {
  const box = figure.querySelector(".canvas"), select = figure.querySelector("select");
  const count = new Map();
  for (const curves of Object.values(data.curves)) for (const name of Object.keys(curves)) count.set(name, (count.get(name) ?? 0) + 1);
  // Losses of the distillation first, and of each kind what most runs have.
  const rank = (name) => 2 * !name.startsWith("distillation") + !name.endsWith("loss");
  const names = [...count.keys()].sort((a, b) => rank(a) - rank(b) || count.get(b) - count.get(a));
  options(select, names.map((name) => ({ name, title: name })));
  const update = () => {
    const spec = structuredClone(data.charts.loss), points = [];
    for (const [run, curves] of Object.entries(data.curves)) {
      if (!shown.has(run) || !curves[select.value]) continue;
      const { x, y } = curves[select.value];
      x.forEach((a, i) => points.push({ x: a, y: y[i], name: run, order: i, ...look(run), opacity: 1 }));
    }
    const positive = points.length > 0 && points.every((p) => p.y > 0);
    axisOf(spec, "y", select.value, points.map((p) => p.y), positive);
    spec.description = `${select.value} over steps of training, ${shown.size} runs`;
    return draw(box, spec, points);
  };
  select.addEventListener("change", update);
  whenNear(figure, () => { update(); document.addEventListener("shown", update); });
}

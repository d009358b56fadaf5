// What all parts share: the data, which students are shown and how each looks, and small helpers.
const data = JSON.parse(document.getElementById("data").textContent);
const SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right"];
const DASHES = [[1, 0], [6, 3], [2, 3], [9, 3, 2, 3]];
const FIRST_SHOWN = 7; // as many as there are colours
const shown = new Map(); // name -> slot, kept while it is shown so that a look never changes under the reader

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function show(names, on = true) {
  for (const name of names) {
    if (!on) shown.delete(name);
    else if (!shown.has(name)) {
      const taken = new Set(shown.values());
      let slot = 0;
      while (taken.has(slot)) slot += 1;
      shown.set(name, slot);
    }
  }
  document.dispatchEvent(new Event("shown"));
}

// Colours return after seven with other shapes and dashes.
function look(name) {
  const slot = shown.get(name), again = Math.floor(slot / 7);
  return {
    colour: `var(--c${slot % 7})`, shape: SHAPES[(slot + again) % SHAPES.length], dash: DASHES[again % DASHES.length],
  };
}

const OUTLINES = {
  circle: "M11 2.6a3.4 3.4 0 1 0 .01 0z", square: "M7.9 2.9h6.2v6.2h-6.2z", "triangle-up": "M11 2l4 7.2h-8z",
  diamond: "M11 1.6l4.2 4.4-4.2 4.4-4.2-4.4z", "triangle-down": "M11 10l4-7.2h-8z",
  cross: "M9.8 2h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8v-2.4h2.8z", "triangle-right": "M15 6l-7.2 4v-8z",
};

function swatch(name) {
  const box = element("span", { class: "swatch", "aria-hidden": "true" });
  paintSwatch(box, name);
  return box;
}

function paintSwatch(box, name) {
  if (!shown.has(name)) return box.replaceChildren();
  const { colour, shape, dash } = look(name);
  const dashes = dash[1] ? ` stroke-dasharray="${dash.map((d) => d * 0.7).join(" ")}"` : "";
  box.innerHTML = `<svg viewBox="0 0 22 12" style="color:${colour}"><path d="M0 6H22" stroke="currentColor" stroke-width="2"${dashes}/>` +
    `<path d="${OUTLINES[shape]}" fill="currentColor"/></svg>`;
}

function say(text) {
  document.getElementById("live").textContent = text;
}

// The colour that a variable of the style has in the present theme, for canvases, which know no variables.
function colourOf(node, name) {
  const before = node.style.color;
  node.style.color = `var(${name})`;
  const value = getComputedStyle(node).color;
  node.style.color = before;
  return value;
}

// Call when the node comes near the window, once.
const whenNear = (() => {
  const calls = new WeakMap();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      calls.get(entry.target)();
    }
  }, { rootMargin: "400px" });
  return (node, call) => { calls.set(node, call); observer.observe(node); };
})();

const calls = (n) => `${n} network call${n === 1 ? "" : "s"}`;

// Positions from the page's base64, in units of the frame's half side: NaN where a point was too far off.
const decoded = new Map();
function positions(text) {
  if (!decoded.has(text)) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const whole = new Int16Array(bytes.buffer);
    decoded.set(text, Float32Array.from(whole, (v) => (v === -32768 ? NaN : (3 * v) / 32767)));
  }
  return decoded.get(text);
}

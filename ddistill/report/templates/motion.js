// Paths from the noise to the data in two dimensions, at a time that a slider or the clock sets.
const CALM = window.matchMedia("(prefers-reduced-motion: reduce)");

const stepsOf = (n) => `${n} step${n === 1 ? "" : "s"}`;

// Where path i is when so much of the noise is left: straight between the sampler's own times.
function placeAt(motion, xy, i, left) {
  const times = motion.noise, n = motion.n;
  let k = 1;
  while (k < times.length - 1 && times[k] > left) k += 1;
  const share = Math.min(1, Math.max(0, (times[k - 1] - left) / Math.max(times[k - 1] - times[k], 1e-9)));
  const at = (j, c) => xy[2 * (j * n + i) + c];
  return [0, 1].map((c) => at(k - 1, c) * (1 - share) + at(k, c) * share);
}

function paintMotion(canvas, group, motion, left) {
  const to = clean(canvas);
  if (!to) return;
  const { pen, half, unit } = to, xy = positions(motion.points);
  const place = ([x, y]) => [half * (1 + x), half * (1 - y)];
  paintCentres(to, canvas, group, []);
  pen.strokeStyle = colourOf(canvas, "--c0");
  pen.lineWidth = 1 * unit;
  pen.globalAlpha = 0.3;
  const past = motion.noise.filter((a) => a > left);
  for (let i = 0; i < Math.min(motion.n, 48); i += 1) {
    pen.beginPath();
    past.forEach((_, k) => {
      const p = place([xy[2 * (k * motion.n + i)], xy[2 * (k * motion.n + i) + 1]]);
      if (k) pen.lineTo(...p);
      else pen.moveTo(...p);
    });
    pen.lineTo(...place(placeAt(motion, xy, i, left)));
    pen.stroke();
  }
  pen.globalAlpha = 0.8;
  pen.fillStyle = colourOf(canvas, "--c1");
  for (let i = 0; i < motion.n; i += 1) {
    const [x, y] = place(placeAt(motion, xy, i, left));
    pen.beginPath();
    pen.arc(x, y, 1.9 * unit, 0, 2 * Math.PI);
    pen.fill();
  }
  pen.globalAlpha = 1;
}

function motionView(root, group) {
  const slider = root.querySelector(".time"), output = root.querySelector("output"), play = root.querySelector(".play");
  const sides = [".left", ".right"].map((name) => root.querySelector(name));
  let chosen = [null, null], frame = 0, timer = 0;
  const update = () => {
    const left = 1 - slider.value / 1000;
    output.textContent = `${Math.round(100 * left)} % noise`;
    slider.setAttribute("aria-valuetext", `${Math.round(100 * left)} percent noise`);
    sides.forEach((side, i) => {
      const motion = chosen[i], canvas = side.querySelector("canvas");
      if (!motion) return;
      const steps = motion.noise.length - 1;
      canvas.setAttribute("aria-label", `${motion.n} paths of ${motion.label} in ${stepsOf(steps)}, ${output.textContent}`);
      side.querySelector("figcaption").replaceChildren(element("b", {}, motion.label), stepsOf(steps));
      canvas.draw = () => paintMotion(canvas, group, motion, 1 - slider.value / 1000);
      canvas.draw();
    });
  };
  const stop = () => {
    cancelAnimationFrame(frame);
    clearInterval(timer);
    frame = timer = 0;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  };
  const to = (time) => {
    slider.value = Math.min(1000, time);
    update();
    if (time >= 1000) { stop(); say("At the data"); }
  };
  play.addEventListener("click", () => {
    if (frame || timer) return stop();
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    if (Number(slider.value) === 1000) slider.value = 0;
    if (CALM.matches) { // single pictures, far apart, for readers who asked for less motion
      timer = setInterval(() => to(Number(slider.value) + 125), 900);
      return;
    }
    let last = 0;
    const tick = (now) => {
      const time = Number(slider.value) + (last ? Math.max(1, ((now - last) / 5000) * 1000) : 0);
      last = now;
      frame = requestAnimationFrame(tick);
      to(time);
    };
    frame = requestAnimationFrame(tick);
  });
  slider.addEventListener("input", () => { stop(); update(); });
  sides.forEach((side) => watchSize(side.querySelector("canvas")));
  chosen[1] = besideChoice(root.querySelector(".beside"), group.motions, (one) => { chosen[1] = one; update(); });
  switcher(root.querySelector(".switch"), () => group.motions.filter(isShown), (one) => { chosen[0] = one; update(); });
}

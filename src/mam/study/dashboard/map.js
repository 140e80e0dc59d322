// Agents of an episode where they were, on a canvas, and the clock of the replay: it plays here,
// where frames are drawn, and tells the server a few times a second at which state it is.
const STOPS = [[0, 114, 178], [0, 158, 115], [240, 180, 30]]; // low to high, on either background
const SHADES = 32; // agents of one colour are one path
const SEGMENTS = 20000; // of all trails in a frame: the more agents, the shorter
const NAMED = 40; // agents up to which each is labelled
const ROUND = 300; // agents up to which they are circles; hexagons take half the time
const TOLD = 120; // milliseconds at least between two states that the server is told
const NEAR = 16; // pixels around an agent in which it is pointed at
const HINT = "Point at an agent for its numbers; click to keep them.";

const COLOURS = Array.from({ length: SHADES }, (_, shade) => {
  const at = (shade / (SHADES - 1)) * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2), [from, to] = [STOPS[low], STOPS[low + 1]];
  return `rgb(${from.map((value, c) => Math.round(value + (at - low) * (to[c] - value)))})`;
});
const RAMP = { background: `linear-gradient(90deg, ${STOPS.map((stop) => `rgb(${stop})`)})` };
const HEXAGON = [1, 2, 3, 4, 5].map((k) => [Math.cos((k * Math.PI) / 3), Math.sin((k * Math.PI) / 3)]);

export default {
  template: `
    <div v-show="shown" class="mam-map">
      <canvas ref="canvas" role="img" aria-label="where agents are" @pointermove="point"
        @pointerdown="point" @pointerleave="leave" @click="pin"></canvas>
      <div class="mam-map-legend mam-faint">
        <span>{{ ends[0] }}</span><i :style="ramp"></i><span>{{ ends[1] }}</span>
      </div>
      <div class="mam-map-told">{{ told }}</div>
    </div>`,
  props: {
    episode: Object, // see scene() in map.py
    shown: Boolean,
    colour: String, // value or order
    trail: Number, // steps
    speed: Number, // steps a second
    chart: Number, // on which the state is marked
  },
  data: () => ({ told: HINT, ramp: RAMP }),
  computed: {
    ends() {
      if (this.colour == "order") return ["decides first", "last"];
      const [low, high] = this.episode.range ?? [0, 0];
      return [`value ${mam.short(low)}`, mam.short(high)];
    },
  },
  created() {
    // Beside data(), where Vue would watch every number. Between two whole numbers, t is on the way
    // from one state to the next.
    Object.assign(this, { toldAt: 0, stateTold: 0, xy: [] });
  },
  mounted() {
    this.resized = new ResizeObserver(this.draw);
    this.resized.observe(this.$refs.canvas);
    this.open();
  },
  unmounted() {
    this.resized.disconnect();
    cancelAnimationFrame(this.request);
  },
  watch: {
    "episode.opened": "open", // the object itself is a new one whenever any property changes
    colour: "draw",
    trail: "draw",
  },
  methods: {
    async open() {
      cancelAnimationFrame(this.request);
      Object.assign(this, { t: 0, request: 0, arrays: null, pointed: -1, pinned: -1 });
      const { key, opened, length, agents, parts } = this.episode;
      if (!parts) return;
      const answer = await fetch(`${window.path_prefix}/replays/${key}.f32`);
      const all = answer.ok && new Float32Array(await answer.arrayBuffer());
      if (!all || opened != this.episode.opened) return;
      let at = 0;
      const take = (size) => all.subarray(at, (at += length * agents.length * size));
      this.arrays = Object.fromEntries(Object.entries(parts).map(([name, size]) => [name, take(size)]));
      this.xy = new Float64Array(2 * agents.length);
      this.draw();
    },
    toggle() {
      if (this.request) return this.stop();
      if (this.t >= this.episode.last) this.t = 0;
      let before = performance.now();
      const frame = (now) => {
        this.t = Math.min(this.t + (Math.max(now - before, 0) / 1000) * this.speed, this.episode.last);
        before = now;
        if (this.t >= this.episode.last) return this.stop();
        this.request = requestAnimationFrame(frame);
        this.draw();
        if (now - this.toldAt >= TOLD && Math.floor(this.t) != this.stateTold) this.tell();
      };
      this.request = requestAnimationFrame(frame);
      this.tell();
    },
    stop() {
      cancelAnimationFrame(this.request);
      this.request = 0;
      this.seek(Math.floor(this.t)); // the state whose numbers the server shows
      this.tell();
    },
    seek(state) {
      this.t = state;
      this.draw();
    },
    tell() {
      [this.toldAt, this.stateTold] = [performance.now(), Math.floor(this.t)];
      this.$emit("state", this.episode.opened, this.stateTold, this.request != 0);
    },
    mark() {
      const view = getElement(this.chart), x = view?.chart?.convertToPixel({ xAxisIndex: 0 }, this.t + 1);
      if (Number.isFinite(x)) view.$el.style.setProperty("--now", `${x}px`);
    },
    draw() {
      this.mark();
      const canvas = this.$refs.canvas, { clientWidth: width, clientHeight: height } = canvas;
      if (!this.arrays || !width) return;
      const ratio = Math.min(window.devicePixelRatio || 1, 2), look = getComputedStyle(canvas);
      const size = [Math.round(width * ratio), Math.round(height * ratio)];
      if (canvas.width != size[0] || canvas.height != size[1]) [canvas.width, canvas.height] = size;
      const ink = canvas.getContext("2d"), agent = this.pointed >= 0 ? this.pointed : this.pinned;
      ink.setTransform(ratio, 0, 0, ratio, 0, 0);
      ink.clearRect(0, 0, width, height);
      const scene = { ...this.arrays, ...fit(this.episode, width, height), ratio, xy: this.xy };
      scene.names = [...this.episode.agents];
      scene.colour = (name) => look.getPropertyValue(`--mam-${name}`);
      scene.font = look.fontFamily;
      scene.step = Math.min(Math.floor(this.t), this.episode.length - 1);
      place(scene, this.t < this.episode.length - 1 ? this.t - scene.step : 0);
      drawGround(ink, scene);
      drawAgents(ink, scene, this.shades(scene), Math.min(this.trail, Math.floor(SEGMENTS / scene.count)));
      if (scene.count <= NAMED) drawNames(ink, scene, this.colour == "order");
      if (agent >= 0) drawChosen(ink, scene, agent);
      this.told = agent >= 0 ? numbers(scene, agent, this.episode.parts.action) : HINT;
    },
    shades({ count, step, value, place }) {
      const [low, high] = this.colour == "order" ? [0, count - 1] : this.episode.range;
      const of = (this.colour == "order" ? place : value).subarray(count * step, count * (step + 1));
      return Uint8Array.from(of, (v) => Math.min(Math.max((v - low) / (high - low) || 0, 0), 1) * (SHADES - 1));
    },
    point(event) {
      const { left, top } = this.$refs.canvas.getBoundingClientRect();
      this.pointed = nearest(this.xy, event.clientX - left, event.clientY - top);
      if (!this.request) this.draw();
    },
    leave() {
      this.pointed = -1;
      this.draw();
    },
    pin() {
      this.pinned = this.pointed;
      this.draw();
    },
  },
};

// How the episode's plane lies on the canvas: x0 + scale · x, y0 + scale · y.
function fit({ box, cells, agents }, width, height) {
  const [left, top, right, bottom] = box, count = agents.length;
  const scale = Math.min((width - 4) / (right - left), (height - 4) / (bottom - top));
  const x0 = (width - scale * (left + right)) / 2, y0 = (height - scale * (top + bottom)) / 2;
  const room = scale * Math.sqrt(((right - left) * (bottom - top)) / count);
  const radius = Math.max(1.5, Math.min(9, 0.3 * room, cells ? 0.42 * scale : 9));
  return { left, top, right, bottom, cells, count, scale, x0, y0, radius };
}

// Where each agent is drawn: between two steps on the line from one place to the next.
function place({ positions, xy, count, step, scale, x0, y0 }, part) {
  const from = 2 * count * step, to = part ? from + 2 * count : from;
  for (let i = 0; i < 2 * count; i += 2) {
    const x = positions[from + i], y = positions[from + i + 1];
    xy[i] = x0 + scale * (x + part * (positions[to + i] - x));
    xy[i + 1] = y0 + scale * (y + part * (positions[to + i + 1] - y));
  }
}

function drawGround(ink, { left, top, right, bottom, cells, scale, x0, y0, colour }) {
  const [across, down] = cells && scale > 5 ? [1, 1] : [right - left, bottom - top], lines = new Path2D();
  for (let x = left; x < right + across / 2; x += across) {
    lines.moveTo(x0 + scale * x, y0 + scale * top);
    lines.lineTo(x0 + scale * x, y0 + scale * bottom);
  }
  for (let y = top; y < bottom + down / 2; y += down) {
    lines.moveTo(x0 + scale * left, y0 + scale * y);
    lines.lineTo(x0 + scale * right, y0 + scale * y);
  }
  ink.strokeStyle = colour("line");
  ink.lineWidth = 1;
  ink.stroke(lines);
}

function drawAgents(ink, scene, shades, trail) {
  const { alive, xy, count, step, radius, ratio, colour } = scene;
  const paths = () => COLOURS.map(() => new Path2D());
  const trails = paths(), points = paths(), dead = new Path2D();
  for (let agent = 0; agent < count; agent++) {
    const x = xy[2 * agent], y = xy[2 * agent + 1], lives = alive[step * count + agent];
    if (x != x) continue; // NaN: nowhere
    if (lives && trail) addWay(trails[shades[agent]], scene, agent, Math.max(step - trail, 0));
    const path = lives ? points[shades[agent]] : dead;
    path.moveTo(x + radius, y);
    if (count <= ROUND) path.arc(x, y, radius, 0, 7);
    else for (const [across, down] of HEXAGON) path.lineTo(x + radius * across, y + radius * down);
  }
  ink.lineJoin = "bevel";
  ink.lineWidth = count <= NAMED ? 2 : 1 / ratio; // one pixel takes a sixth of the time of any more
  ink.globalAlpha = 0.45;
  trails.forEach((path, shade) => {
    ink.strokeStyle = COLOURS[shade];
    ink.stroke(path);
  });
  ink.globalAlpha = 0.25;
  ink.fillStyle = colour("faint");
  ink.fill(dead);
  ink.globalAlpha = 1;
  points.forEach((path, shade) => {
    ink.fillStyle = COLOURS[shade];
    ink.fill(path);
  });
}

function addWay(path, { positions, xy, count, step, scale, x0, y0 }, agent, first) {
  for (let s = first; s <= step; s++) {
    const at = 2 * (s * count + agent), x = x0 + scale * positions[at], y = y0 + scale * positions[at + 1];
    if (s == first) path.moveTo(x, y);
    else path.lineTo(x, y);
  }
  path.lineTo(xy[2 * agent], xy[2 * agent + 1]);
}

function drawNames(ink, scene, byOrder) {
  const { xy, count, step, radius, names, colour } = scene;
  ink.font = `11px ${scene.font}`;
  ink.textAlign = "center";
  ink.fillStyle = colour("text");
  for (let agent = 0; agent < count; agent++) {
    const text = byOrder ? `${scene.place[step * count + agent] + 1}` : mam.name(names[agent]);
    ink.fillText(text, xy[2 * agent], xy[2 * agent + 1] - radius - 3);
  }
}

// The agent that is pointed at or was clicked: its whole way so far.
function drawChosen(ink, scene, agent) {
  const way = new Path2D(), x = scene.xy[2 * agent], y = scene.xy[2 * agent + 1];
  addWay(way, scene, agent, 0);
  way.moveTo(x + scene.radius + 3, y);
  way.arc(x, y, scene.radius + 3, 0, 7);
  ink.strokeStyle = scene.colour("text");
  ink.lineWidth = 1.5;
  ink.stroke(way);
}

function numbers({ names, count, step, alive, place, action, log_prob, value, reward }, agent, width) {
  const at = step * count + agent, shown = (v) => (v == v ? mam.short(v) : "–");
  const chosen = Array.from(action.subarray(at * width, (at + 1) * width), shown).join(", ");
  return [
    `agent ${names[agent]}`,
    alive[at] ? `decides ${place[at] + 1} of ${count}` : "dead",
    `action ${chosen}`,
    `log-prob. ${shown(log_prob[at])}`,
    `value ${shown(value[at])}`,
    `reward ${shown(reward[at])}`,
  ].join(" · ");
}

function nearest(xy, x, y) {
  let least = NEAR * NEAR, found = -1;
  for (let i = 0; i < xy.length; i += 2) {
    const away = (xy[i] - x) ** 2 + (xy[i + 1] - y) ** 2;
    if (away < least) [least, found] = [away, i / 2];
  }
  return found;
}

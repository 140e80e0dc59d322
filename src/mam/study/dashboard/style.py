"""How the page looks: a style sheet, and the few functions that run in the browser."""

GREY = "#8a8f94"  # of axes and their labels, on either background
TOGGLE = "no-caps unelevated size=sm padding='3px 10px'"  # Quasar's properties of a choice of two
# How the legend of a chart looks, apart from its text.
LEGEND = {
    "type": "scroll",
    "top": 2,
    "left": 0,
    "icon": "roundRect",
    "itemWidth": 14,
    "itemHeight": 4,
}
STATES = {"running": "#0072B2", "finished": "#009E73", "stopped": "#E69F00", "failed": "#D55E00"}

_STYLE = """
<style>
:root { --mam-bg: #f7f7f5; --mam-card: #fff; --mam-line: #e4e4e0; --mam-text: #22262a;\
 --mam-faint: #747a80; }
body.body--dark { --mam-bg: #15181b; --mam-card: #1c2024; --mam-line: #2d3238; --mam-text: #dde1e4;
  --mam-faint: #8f979e; }
body, body.body--dark { background: var(--mam-bg); color: var(--mam-text);
  font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", sans-serif; }
.nicegui-content { padding: 0; }
.mam-page { width: 100%; max-width: 1500px; margin: 0 auto; padding: 14px 20px 40px; gap: 12px; }
.mam-head { width: 100%; align-items: baseline; gap: 12px; }
.mam-title { font-size: 1.25rem; font-weight: 650; letter-spacing: .02em; }
.mam-faint { color: var(--mam-faint); font-size: .85rem; }
.mam-trouble { width: 100%; padding: 6px 12px; border-left: 4px solid #D55E00;\
 background: var(--mam-card); }
.mam-path { overflow-wrap: anywhere; }
.mam-table-frame { width: 100%; }
.mam-table { width: 100%; height: 100%;  --ag-font-size: 13px;
  --ag-background-color: var(--mam-card); --ag-border-color: var(--mam-line);\
 --ag-wrapper-border-radius: 8px;
  --ag-header-background-color: var(--mam-card); --ag-font-family: inherit;\
 --ag-foreground-color: var(--mam-text);
  --ag-data-font-color: var(--mam-text); --ag-header-font-weight: 500; }
.mam-wrap { white-space: normal; overflow-wrap: anywhere; line-height: 1.35; padding-top: 6px;\
 padding-bottom: 6px; }
.mam-state::before { content: ""; display: inline-block; width: 8px; height: 8px;\
 border-radius: 50%;
  margin-right: 7px; background: var(--dot); }
.mam-progress { background-repeat: no-repeat; background-size: 100% 3px;\
 background-position: bottom; }
.mam-tabs { width: 100%; border-bottom: 1px solid var(--mam-line); }
.mam-tabs .q-tab { padding: 0 14px; }
.mam-panels { width: 100%; background: transparent !important; }
.mam-panels .q-tab-panel { padding: 4px 0; overflow-x: hidden; }
.mam-bar { width: 100%; align-items: center; gap: 8px 16px; }
.mam-charts { width: 100%; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.mam-card { background: var(--mam-card); border: 1px solid var(--mam-line); border-radius: 8px;\
 padding: 10px 12px;
  min-width: 0; }
.mam-chart { width: 100%; height: 330px; }
.mam-card-title { font-weight: 600; font-size: .92rem; overflow-wrap: anywhere; }
/* A shade at an edge says that there is more beyond it;\
 at the end the card's own colour covers it. */
.mam-scroll { width: 100%; overflow-x: auto;
  background: linear-gradient(90deg, var(--mam-card) 30%, transparent)\
 left / 36px 100% no-repeat local,
    linear-gradient(270deg, var(--mam-card) 30%, transparent) right / 36px 100% no-repeat local,
    linear-gradient(90deg, #8889, transparent) left / 12px 100% no-repeat scroll,
    linear-gradient(270deg, #8889, transparent) right / 12px 100% no-repeat scroll;\
 background-color: var(--mam-card); }
.mam-grid { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
.mam-grid th { text-align: left; font-weight: 500; color: var(--mam-faint); }
.mam-grid th, .mam-grid td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--mam-line);\
 vertical-align: top; }
.mam-grid th, .mam-grid td { overflow-wrap: break-word; max-width: 300px; }
.mam-grid .r { text-align: right; }
.mam-grid tr.dead { opacity: .45; }
.mam-mixing { display: flex; flex-wrap: wrap; gap: 8px 22px; margin-top: 10px;\
 color: var(--mam-faint); font-size: .76rem; }
.mam-mixing figure { margin: 0; }
.mam-mixing figcaption { color: var(--mam-text); }
.mam-mixing table { border-collapse: collapse; }
.mam-mixing th { font-weight: 400; text-align: right; vertical-align: bottom;\
 padding: 0 5px 0 0; white-space: nowrap; }
.mam-mixing th span { writing-mode: vertical-rl; transform: rotate(180deg); padding: 5px 0; }
.mam-mixing td { min-width: 17px; height: 17px; border: 1px solid var(--mam-line);\
 background: rgb(0 114 178 / var(--share)); }
.mam-log { width: 100%; max-height: 420px; overflow: auto; margin: 0; font-size: .76rem;\
 line-height: 1.45;
  white-space: pre; font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.mam-replay { width: 100%; display: grid; gap: 12px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); }
.mam-frame { width: 100%; max-width: 640px; background: #fff; border-radius: 4px;\
 overflow: hidden; }
.mam-decisions { max-height: 540px; overflow-y: auto; }
.mam-course { position: relative; width: 100%; height: 190px; margin-top: 10px; }
.mam-course::after { content: ""; position: absolute; left: 0; top: 26px; bottom: 22px; width: 1px;
  background: #8a8f94; transform: translateX(var(--now, -9px)); pointer-events: none; }
.mam-map canvas { display: block; width: 100%; height: min(78vh, 640px);\
 touch-action: manipulation; cursor: crosshair; }
.mam-map-legend { display: flex; align-items: center; gap: 8px; padding: 6px 0 2px; }
.mam-map-legend i { flex: 0 1 160px; height: 8px; border-radius: 4px; }
.mam-map-told { font-size: .85rem; min-height: 2.6em;\
 font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  .mam-progress::before { content: ""; display: inline-block; width: 8px; height: 8px;\
 border-radius: 50%;
    margin-right: 6px; background: var(--dot); }
  .mam-page { padding: 10px 10px 30px; }
  .mam-chart { height: 270px; }
  .mam-map canvas { height: 92vw; max-height: 70vh; }
  .mam-map-told { min-height: 3.9em; }
  .mam-tabs .q-tab { padding: 0 9px; }
  .mam-card { padding: 8px; }
}
</style>
"""

_SCRIPT = """
<script>
window.mam = {
  short(v) {
    const a = Math.abs(v);
    for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (a >= size) return +(v / size).toPrecision(4) + unit;
    return a && a < 1e-3 ? v.toExponential(1) : "" + +v.toPrecision(4);
  },
  time(s) {
    if (s < 90) return Math.round(s) + " s";
    if (s < 5400) return Math.round(s / 60) + " min";
    if (s < 172800) return +(s / 3600).toFixed(1) + " h";
    return +(s / 86400).toFixed(1) + " d";
  },
  name(s) { return s.length > 40 ? s.slice(0, 16) + "…" + s.slice(-23) : s; },
  fit(grid, frame, head, row) {  // as high as the rows, up to a good part of the screen
    const count = grid.getDisplayedRowCount(),\
 last = count && grid.getDisplayedRowAtIndex(count - 1);
    const rows = Math.max(last ? last.rowTop + last.rowHeight : 0, 2 * row);
    frame.style.height = `min(${head + rows + 2}px, 42vh)`;
  },
  skew: 0,  // seconds the server's clock is ahead
  age(last) { return last ? mam.time(Math.max(0, Date.now() / 1000 + mam.skew - last)) : "–"; },
  tooltip(axis) {
    return points => {
      const rows = points.filter(p => p.data.length > 2).map(p => {
        const [x, y, low, high] = p.data;
        const band = low == null ? "" :\
 ` <span style="opacity:.65">[${mam.short(low)}, ${mam.short(high)}]</span>`;
        return `${p.marker}${echartsEscape(p.seriesName)} <b>${mam.short(y)}</b>${band}`;
      });
      return [mam[axis](points[0].axisValue) + (axis == "short" ? " steps" : ""),\
 ...rows].join("<br>");
    };
  },
};
function echartsEscape(s) { return s.replace(/[&<>"]/g, c => "&#" + c.charCodeAt(0) + ";"); }
</script>
"""

HEAD = _STYLE + _SCRIPT

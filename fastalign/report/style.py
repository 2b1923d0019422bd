"""Style sheet and script of the report page."""

PALETTE = ["#2f6fde", "#d9730d", "#12936a", "#b03fc4", "#d23b4b", "#0d8ea8", "#6f8f1d", "#7a5be0"]
DARK_PALETTE = ["#6ea2ff", "#f2a154", "#4fcf9f", "#dd8cee", "#ff7f8b", "#57c8de", "#b3d05a", "#ab94ff"]

_LIGHT_VARIABLES = "".join(f"--s{i}:{color};" for i, color in enumerate(PALETTE))
_DARK_VARIABLES = "".join(f"--s{i}:{color};" for i, color in enumerate(DARK_PALETTE))
_LINE_COLORS = "".join(
    f"path.s{i},circle.s{i}{{stroke:var(--s{i})}}circle.s{i}{{fill:var(--s{i})}}i.s{i}{{border-color:var(--s{i})}}"
    for i in range(len(PALETTE))
)

STYLE = (
    ":root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1d2129;--muted:#667085;--line:#e4e7ec;"
    f"--good:#12805c;--bad:#c0362c;{_LIGHT_VARIABLES}}}"
    "@media(prefers-color-scheme:dark){:root{--bg:#121418;--card:#1b1e24;--text:#e6e8ec;--muted:#98a1b0;--line:#2d323b;"
    f"--good:#4fcf9f;--bad:#ff7f8b;{_DARK_VARIABLES}}}}}"
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 60px}
header p{margin:2px 0 0;color:var(--muted)}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:13px;text-transform:uppercase;letter-spacing:.07em;color:var(--muted);margin:34px 0 10px;font-weight:600}
h3{font-size:15px;margin:18px 0 6px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:7px 14px;border-top:1px solid var(--line);white-space:nowrap}
thead th{border-top:0;color:var(--muted);font-weight:500;font-size:13px}
td.number{text-align:left}
td:first-child{color:var(--muted)}
table.results td:not(:first-child){font-weight:600;font-size:16px}
table.samples td,table.settings td{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:13px;
white-space:pre-wrap;overflow-wrap:anywhere;vertical-align:top;max-width:420px}
table.samples td:first-child{color:var(--text)}
table.health td{white-space:normal;vertical-align:top}table.health td:nth-child(-n+2){color:var(--bad);font-weight:600}
.right{color:var(--good)}.wrong{color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 10px 4px}
figcaption{display:flex;flex-wrap:wrap;gap:4px 14px;justify-content:space-between;padding:0 8px 6px;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-weight:400;font-size:12.5px;color:var(--muted)}
.legend i{display:inline-block;width:16px;border-top:2.5px solid;margin-right:5px;vertical-align:middle}
.legend i.dashed{border-top-style:dashed}
svg{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{fill:var(--muted);font-size:11px}
svg .grid{stroke:var(--line);stroke-width:1}
svg .cross{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 3}
svg path{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg path.dashed{stroke-dasharray:5 3}
summary{cursor:pointer;margin-bottom:8px;color:var(--muted)}
#tip{position:absolute;visibility:hidden;pointer-events:none;white-space:nowrap;
background:var(--card);border:1px solid var(--line);border-radius:7px;padding:6px 10px;font-size:12.5px;
box-shadow:0 4px 14px rgba(0,0,0,.14)}
#tip i{display:inline-block;width:10px;border-top:3px solid;margin-right:6px;vertical-align:middle}
"""
    + _LINE_COLORS
)

SCRIPT = """
const tip=document.getElementById("tip");
for(const svg of document.querySelectorAll("svg[data-lines]")){
  const lines=JSON.parse(svg.dataset.lines),cross=svg.querySelector(".cross");
  svg.addEventListener("pointermove",event=>{
    const box=svg.getBoundingClientRect(),x=(event.clientX-box.left)*svg.viewBox.baseVal.width/box.width;
    const near=lines.map(line=>line.points.reduce((a,b)=>Math.abs(b[1]-x)<Math.abs(a[1]-x)?b:a));
    const at=near.reduce((a,b)=>Math.abs(b[1]-x)<Math.abs(a[1]-x)?b:a);
    cross.setAttribute("x1",at[1]);cross.setAttribute("x2",at[1]);cross.setAttribute("visibility","visible");
    tip.replaceChildren("step "+at[0]);
    lines.forEach((line,k)=>{
      const row=document.createElement("div"),mark=document.createElement("i");
      mark.className="s"+line.color;
      row.append(mark,line.label+"  "+Number(near[k][2].toPrecision(6)));
      tip.append(row);
    });
    const fits=event.pageX+14+tip.offsetWidth<=document.documentElement.clientWidth;
    const left=fits?event.pageX+14:event.pageX-14-tip.offsetWidth;
    tip.style.left=left+"px";tip.style.top=event.pageY+14+"px";tip.style.visibility="visible";
  });
  svg.addEventListener("pointerleave",()=>{tip.style.visibility="hidden";cross.setAttribute("visibility","hidden");});
}
"""

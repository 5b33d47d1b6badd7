"use strict";
(() => {
  const all = (what, where = document) => [...where.querySelectorAll(what)];

  // Sorting: numbers by data-v; what is missing stays at the end.
  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.v !== undefined) return cell.dataset.v === "" ? null : Number(cell.dataset.v);
    return cell.textContent.trim() || null;
  };
  for (const button of all("th button.sort")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
      const down = head.getAttribute("aria-sort") === "ascending" || (!head.hasAttribute("aria-sort") && button.dataset.first === "down");
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [value(row, column), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  }

  // Copying: one click, with a way around where the clipboard is closed to pages from the disk.
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  const source = document.getElementById("data");
  const data = source ? JSON.parse(source.textContent) : { words: [] };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const of = button.dataset.of ? document.getElementById(button.dataset.of).textContent.trim() : button.dataset.c.split(" ").map((index) => data.words[index]).join(" ");
    await copy(of);
    const before = button.dataset.label || (button.dataset.label = button.textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = before; }, 1200);
  });

  // Filtering: all words must be in a row; marks without a row left fade.
  const filter = document.getElementById("filter");
  const rowOf = (job) => document.getElementById("j" + job);
  const marks = []; // [element, point]
  const narrow = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = document.getElementById("kind").value;
    let shown = 0;
    for (const row of document.getElementById("jobs").tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      const fits = words.every((word) => text.includes(word)) && (!kind || row.classList.contains(kind));
      row.hidden = !fits;
      shown += fits;
    }
    document.getElementById("shown").textContent = shown;
    for (const [mark, point] of marks) mark.classList.toggle("faded", point.jobs.every((job) => rowOf(job).hidden));
  };

  // The picture: the marks are in the order of the data. A setting is called what its first run sets, but for the seed.
  const toldBy = (cells) => [[2, "", " bytes"], [3, "", " times smaller"], [4, data.metric + " ", ""], [5, "", " to dense"]]
    .filter(([column]) => cells[column].textContent).map(([column, before, after]) => before + cells[column].textContent + after).join(", ");
  for (const point of data.points || []) {
    const words = rowOf(point.jobs[0]).querySelector(".code").textContent;
    point.told ??= toldBy(rowOf(point.jobs[0]).cells);
    point.name = words.replace(/(^| )seed=\S*/, "").trim() || words || "as configured";
  }
  const tip = document.getElementById("tip");
  const show = (mark, point) => {
    tip.replaceChildren();
    const line = (text, name) => { const one = document.createElement("div"); one.textContent = text; if (name) one.className = name; tip.append(one); };
    line(point.name);
    line(point.told, "muted");
    if (point.jobs.length > 1 || mark.dataset.touched) {
      const links = document.createElement("div");
      for (const job of point.jobs) {
        const link = rowOf(job).querySelector("a");
        if (link) links.append(link.cloneNode(true), " ");
      }
      tip.append(links);
    }
    tip.hidden = false;
    const box = mark.getBoundingClientRect();
    const left = Math.min(Math.max(box.left - tip.offsetWidth / 2, 8), document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = left + scrollX + "px";
    tip.style.top = box.bottom + scrollY + 8 + "px";
    for (const row of all("tr.seen")) row.classList.remove("seen");
    for (const job of point.jobs) rowOf(job).classList.add("seen");
  };
  const hide = () => { if (tip) tip.hidden = true; for (const row of all("tr.seen")) row.classList.remove("seen"); };
  for (const button of all("button.show")) {
    button.addEventListener("click", () => {
      for (const other of all("button.show")) other.setAttribute("aria-pressed", other === button);
      for (const picture of all(".picture")) picture.hidden = picture.dataset.picture !== button.dataset.show;
    });
  }
  const within = (mark) => { // a mark beyond the axes is there, but not to be seen
    const clip = mark.closest("[clip-path]");
    const frame = clip && document.querySelector(clip.getAttribute("clip-path").slice(4, -1) + " rect");
    const y = Number(mark.getAttribute("y"));
    return !frame || !mark.hasAttribute("y") || (y >= Number(frame.getAttribute("y")) && y <= Number(frame.getAttribute("y")) + Number(frame.getAttribute("height")));
  };
  for (const picture of ["all-wide-", "all-narrow-", "near-wide-", "near-narrow-"]) {
    for (const series of ["front", "other"]) {
      const group = document.getElementById(picture + series);
      if (!group) continue;
      group.classList.add("marks");
      group.closest("svg").setAttribute("role", "group"); // an image would hide its marks from a screen reader
      all("use, path", group).filter((one) => !one.closest("defs")).forEach((mark, index) => {
        if (!within(mark)) return;
        const point = data.points[data[series][index]];
        marks.push([mark, point]);
        mark.setAttribute("tabindex", "0");
        mark.setAttribute("role", "link");
        mark.setAttribute("aria-label", point.name + ": " + point.told);
        mark.addEventListener("mouseenter", () => show(mark, point));
        mark.addEventListener("focus", () => show(mark, point));
        mark.addEventListener("mouseleave", (event) => { if (!tip.contains(event.relatedTarget)) setTimeout(() => { if (!tip.matches(":hover")) hide(); }, 300); });
        const open = (touched) => {
          const link = rowOf(point.jobs[0]).querySelector("a");
          if (point.jobs.length > 1 || touched || !link) {
            mark.dataset.touched = touched ? "1" : "";
            show(mark, point);
          } else location.href = link.href;
        };
        mark.addEventListener("click", (event) => open(event.pointerType !== undefined && event.pointerType !== "mouse"));
        mark.addEventListener("keydown", (event) => { if (event.key === "Enter") open(false); });
      });
    }
  }
  if (tip) {
    tip.addEventListener("mouseleave", hide);
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
    document.addEventListener("pointerdown", (event) => { if (!tip.contains(event.target) && !event.target.closest(".marks")) hide(); });
  }
  if (filter) {
    filter.addEventListener("input", narrow);
    document.getElementById("kind").addEventListener("change", narrow);
  }
  // A link to page.html#filter=words&sort=column&show=near shows the page like that.
  const asked = new URLSearchParams(location.hash.slice(1));
  if (filter && asked.get("filter")) { filter.value = asked.get("filter"); narrow(); }
  const column = asked.get("sort") && all("#jobs th button.sort").find((one) => one.textContent.trim() === asked.get("sort"));
  if (column) column.click();
  if (asked.get("show")) all("button.show").find((one) => one.dataset.show === asked.get("show"))?.click();
})();

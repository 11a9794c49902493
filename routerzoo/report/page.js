// Tables sort at a click on a column's head, and show the rows that have the words of the filter.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const isMissing = (v) => v === "" || v === "nan" || v === "None";
      const compare = (a, b) => isMissing(a) || isMissing(b) ? isMissing(a) - isMissing(b)
        : (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (down ? -1 : 1);
      body.append(...[...body.rows].sort((one, other) => compare(value(one), value(other))));
    });
  });
}
const filter = document.getElementById("filter");
filter.closest("span").hidden = false;
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/);
  for (const row of document.querySelectorAll("table.sortable tbody tr"))
    row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
});

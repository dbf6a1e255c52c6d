const data = JSON.parse(document.getElementById("data").textContent);
document.querySelectorAll("input[type=range]").forEach((slider, constraint) => {
  const section = slider.closest("section");
  const show = () => {
    const row = data[constraint][Number(slider.value)];
    if (!row) return;
    section.querySelector("output").textContent = row.margin;
    section.querySelector("code").textContent = row.command;
    section.querySelectorAll("td").forEach((cell, index) => { cell.textContent = row.cells[index]; });
  };
  slider.addEventListener("input", show);
  show();
});

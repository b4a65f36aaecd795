for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points), cursor = svg.querySelector(".cursor");
  const output = svg.parentNode.querySelector("output");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cursor.setAttribute("cx", near[0]);
    cursor.setAttribute("cy", near[1]);
    cursor.removeAttribute("hidden");
    output.textContent = near[2];
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("hidden", "");
    output.textContent = output.dataset.rest;
  });
}
if (navigator.clipboard) for (const block of document.querySelectorAll(".code")) {
  const button = block.appendChild(document.createElement("button"));
  button.textContent = "Copy";
  button.onclick = () => navigator.clipboard.writeText(block.querySelector("code").textContent)
    .then(() => { button.textContent = "Copied"; });
}

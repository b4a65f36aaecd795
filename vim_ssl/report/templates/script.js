for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points), cursor = svg.querySelector(".cursor");
  const output = svg.parentNode.querySelector("output");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    // The nearest step; of several curves there, the nearest one.
    const far = p => Math.abs(p[0] - x) + 1e-3 * Math.abs(p[1] - y);
    const near = points.reduce((a, b) => far(b) < far(a) ? b : a);
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

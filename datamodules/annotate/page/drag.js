// Dragging by mouse, pen or finger: something that is held follows, and drops into the zone that is under it.

const NEAR = 6;

/**
 * @param handle what is held
 * @param zonesOf gives elements where it can be dropped, each with what `onDrop` receives in `zone`
 */
export function draggable(handle, zonesOf, onDrop, onClick) {
  let start = null;
  let ghost = null;
  let over = null;

  const zoneAt = (event) => {
    let best = null;
    let nearest = 60;
    for (const zone of zonesOf()) {
      const box = zone.getBoundingClientRect();
      const far = Math.hypot(Math.max(box.left - event.clientX, 0, event.clientX - box.right), Math.max(box.top - event.clientY, 0, event.clientY - box.bottom));
      if (far < nearest) [best, nearest] = [zone, far];
    }
    return best;
  };
  const follow = (event) => {
    ghost.style.transform = `translate(${event.clientX - start.dx}px, ${event.clientY - start.dy}px)`;
    const zone = zoneAt(event);
    if (zone !== over) {
      over?.classList.remove("over");
      zone?.classList.add("over");
      over = zone;
    }
  };
  const begin = (event) => {
    const box = handle.getBoundingClientRect();
    start.dx = start.x - box.left;
    start.dy = start.y - box.top;
    ghost = handle.cloneNode(true);
    ghost.classList.add("ghost");
    ghost.setAttribute("aria-hidden", "true");
    document.body.append(ghost);
    document.body.classList.add("dragging");
    handle.classList.add("held");
  };
  const end = (drop) => {
    ghost?.remove();
    document.body.classList.remove("dragging");
    handle.classList.remove("held");
    over?.classList.remove("over");
    const zone = over;
    [start, ghost, over] = [null, null, null];
    if (drop && zone) onDrop(zone);
  };

  handle.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = { x: event.clientX, y: event.clientY };
    handle.setPointerCapture(event.pointerId);
  });
  handle.addEventListener("pointermove", (event) => {
    if (!start) return;
    if (!ghost && Math.hypot(event.clientX - start.x, event.clientY - start.y) < NEAR) return;
    if (!ghost) begin(event);
    follow(event);
  });
  handle.addEventListener("pointerup", () => {
    if (!start) return;
    const dragged = ghost !== null;
    end(true);
    if (!dragged) return;
    const swallow = (event) => event.stopImmediatePropagation();  // the click that ends a drag is none
    handle.addEventListener("click", swallow, { capture: true, once: true });
    setTimeout(() => handle.removeEventListener("click", swallow, { capture: true }), 50);
  });
  handle.addEventListener("pointercancel", () => start && end(false));
  handle.addEventListener("lostpointercapture", () => start && end(false));
  if (onClick) handle.addEventListener("click", onClick);
}

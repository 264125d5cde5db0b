/** Whether a key press is for the focused control (a field, a slider, a menu), not for the page. */
export function typing(event) {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return true;
  const target = event.target;
  return target instanceof Element && target.closest("input, select, textarea, [contenteditable], [role=slider], [role=tab], [data-keys]") !== null;
}

// Runs before the first paint, so that a remembered theme doesn't flash the other one.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("polyseme-theme");
  } catch {
    // Storage may be forbidden; then the system's theme holds.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();

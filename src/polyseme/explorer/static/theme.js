// Runs before the first paint, so that a saved theme doesn't flash the other one.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("polyseme-theme");
  } catch {
    // Storage may be blocked; then the system's theme applies.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();

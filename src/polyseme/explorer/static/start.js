// Says why the page is empty if its modules can't be loaded. A classic script, because browsers load these even from files.
window.addEventListener("error", ({ target }) => {
  if (!(target instanceof HTMLScriptElement)) return;
  const say = () => {
    const notice = document.createElement("p");
    notice.className = "notice bad";
    notice.setAttribute("role", "alert");
    notice.textContent =
      location.protocol === "file:"
        ? "Browsers can show these pages only from a web server, not from a file. In the folder of index.html, run “python -m http.server --bind 127.0.0.1”, and open http://127.0.0.1:8000/."
        : "Part of this page couldn’t be loaded: the server has stopped, or the export is incomplete. Restart “polyseme explore” or the web server, or export the run again.";
    document.getElementById("main").replaceChildren(notice);
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", say);
  else say();
}, true);

// Says why there's no page where its modules can't be loaded. A plain script, as browsers load these from files, too.
window.addEventListener("error", ({ target }) => {
  if (!(target instanceof HTMLScriptElement)) return;
  const say = () => {
    const notice = document.createElement("p");
    notice.className = "notice bad";
    notice.setAttribute("role", "alert");
    notice.textContent =
      location.protocol === "file:"
        ? "A browser shows these pages only if they come from a web server, not from a file. In the folder of index.html run “python -m http.server --bind 127.0.0.1”, and open http://127.0.0.1:8000/."
        : "A part of these pages couldn’t be loaded: the server has stopped, or the folder isn’t whole. Start “polyseme explore” or the web server again, or export the run anew.";
    document.getElementById("main").replaceChildren(notice);
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", say);
  else say();
}, true);

// A classic script: it runs, and can explain itself, where modules do not (pages opened as files, old browsers).
"use strict";

(function () {
  function show(title, text, command) {
    document.getElementById("problem-title").textContent = title;
    document.getElementById("problem-text").textContent = text;
    var line = document.getElementById("problem-command");
    line.textContent = command || "";
    line.hidden = !command;
    document.getElementById("problem").hidden = false;
  }

  // (module (func (drop (i8x16.splat ...)))): the smallest program with a vector instruction.
  var simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];

  if (location.protocol === "file:") {
    show(
      "This page has to come from a server",
      "Browsers do not let a page that was opened as a file read its model. In this folder, run the line below " +
        "and open http://localhost:8000",
      "python -m http.server"
    );
  } else if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(simd))) {
    show(
      "This browser cannot run the model",
      "It has no WebAssembly with vector instructions (SIMD). Chrome and Edge from 91, Firefox from 89 and Safari " +
        "from 16.4 have them; some private or lockdown modes switch WebAssembly off."
    );
  } else if (!("noModule" in HTMLScriptElement.prototype) || typeof Worker === "undefined") {
    show("This browser is too old", "It has no JavaScript modules or no workers. Any browser of the last years has them.");
  } else {
    var script = document.createElement("script");
    script.type = "module";
    script.src = "app.mjs";
    script.onerror = function () {
      show("A part of this page is missing", "app.mjs cannot be loaded; the folder on the server is incomplete.");
    };
    document.head.append(script);
  }
})();

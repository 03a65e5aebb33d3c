// What the tests ask ComfyUI's page. Answers are JSON text: objects handed over directly would turn `undefined` into null.
window.__tests = {
  graph: () => window.app.rootGraph || window.app.graph,

  async open(name, text) {
    await window.app.handleFile(new File([text], name, {type: 'application/json'}));
  },

  async prompt() {
    return JSON.stringify((await window.app.graphToPrompt()).output);
  },

  serialize() {
    return JSON.stringify(this.graph().serialize());
  },

  nodes() {  // of the page and of every subgraph on it
    const found = [], walk = (graph) => {
      for (const node of graph.nodes || []) {
        found.push(node);
        if (node.subgraph) walk(node.subgraph);
      }
    };
    walk(this.graph());
    return found;
  },

  // What a person would see go wrong, as lines of text.
  complaints() {
    const lines = [], registered = window.LiteGraph.registered_node_types;
    for (const node of this.nodes()) {
      if (node.type && !registered[node.type] && !node.subgraph) lines.push(`no node type ${node.type}`);
      if (node.has_errors) lines.push(`${node.type} is marked red`);
      for (const widget of node.widgets || []) {
        let values = widget.options && widget.options.values;
        if (typeof values === 'function') values = values(widget, node);
        if (widget.type === 'combo' && Array.isArray(values) && values.length && !values.includes(widget.value))
          lines.push(`${node.type}.${widget.name}: ${widget.value} is not offered`);
      }
    }
    const notices = '[role=dialog], .p-dialog, .comfy-modal, .p-toast-message, [data-testid="error-overlay"], [data-testid^="error-group-"]';
    for (const element of document.querySelectorAll(notices))
      if (element.getClientRects().length && element.innerText.trim()) lines.push(`notice: ${element.innerText.trim().slice(0, 500)}`);
    for (const [id, error] of Object.entries(window.app.lastNodeErrors || {})) lines.push(`node ${id}: ${JSON.stringify(error)}`);
    return JSON.stringify(lines);
  },

  // One node on an empty page, the view around it: where it is, in pixels of the page.
  async show(type, values) {
    const graph = this.graph(), canvas = window.app.canvas, node = window.LiteGraph.createNode(type);
    graph.clear();
    node.id = this.shown = (this.shown || 1000) + 1;  // none that was there before: the page keeps pictures and values of widgets by it
    graph.add(node);
    for (const widget of node.widgets || []) if (widget.name in values) widget.value = values[widget.name];
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, 300), Math.max(height, node.size[1])]);
    const title = window.LiteGraph.NODE_TITLE_HEIGHT;
    node.pos = [0, 0];
    canvas.background_image = null;
    canvas.ds.scale = 1;
    canvas.ds.offset = [400, 200 + title];
    canvas.setDirty(true, true);
    await new Promise(done => setTimeout(done, 200));
    const box = canvas.canvas.getBoundingClientRect();
    return JSON.stringify({x: box.x + 400, y: box.y + 200, width: node.size[0], height: node.size[1] + title});
  },

  listen() {
    const events = window.__events = [];
    for (const type of ['execution_cached', 'execution_success', 'execution_error', 'execution_interrupted', 'b_preview'])
      window.app.api.addEventListener(type, event => events.push({type, detail: type === 'b_preview' ? null : event.detail ?? null}));
  },

  // Plays each film and sound that came out for half a second: where its player stands then.
  async play() {
    const heard = [];
    for (const player of document.querySelectorAll('video, audio')) {
      if (!/\/view\?.*type=output/.test(player.currentSrc || player.src)) continue;
      player.currentTime = 0;
      player.muted = false;
      await player.play();
      await new Promise(done => setTimeout(done, 500));
      heard.push({kind: player.tagName.toLowerCase(), at: player.currentTime, duration: player.duration, width: player.videoWidth || 0,
        sound: player.webkitAudioDecodedByteCount ?? 0, error: player.error && player.error.message});
    }
    return JSON.stringify(heard);
  },
};

"""ComfyUI's real web page in headless Chromium, over recorded node contracts or a real server."""

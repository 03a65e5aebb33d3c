"""A real ComfyUI, always in a process of its own: started, asked over HTTP, stopped."""

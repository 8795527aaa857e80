"""Ways to run a trained detector faster, a module each; `fpn.load(path, backend=...)` takes them."""

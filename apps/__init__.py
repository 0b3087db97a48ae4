"""Demos over trained adapters, in the browser: ``visadapt app NAME``, or ``python -m apps NAME`` in a clone.

Each module has ``build(adapters) -> gradio.Blocks``; its handlers are plain functions and methods that work without a
server. `apps._server` launches, `apps._safety` looks at every upload first.
"""

from __future__ import annotations

# Name of a module here -> what it shows. `text_to_image` and `text_to_video` join this table with their bases.
APPS = {
    "classify": "an image in, probabilities out: base and adapted side by side",
    "segment": "masks of maps and pictures: without prompts, or by clicks and boxes",
    "adapters": "what an adapter file is, where it loads, its norms and ranks; convert it",
}

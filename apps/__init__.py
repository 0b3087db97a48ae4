"""Demos over trained adapters, in the browser: ``visadapt app NAME``, or ``python -m apps NAME`` in a clone.

Each module has ``build(adapters) -> gradio.Blocks``; its handlers are plain functions and methods that work without a
server. `apps._server` launches, `apps._safety` looks at every upload first.
"""

from __future__ import annotations

# Name of a module here -> what it shows.
APPS = {
    "classify": "an image in, probabilities out: base and adapted side by side",
    "segment": "masks of maps and pictures: without prompts, or by clicks and boxes",
    "text_to_image": "pictures of a prompt: the base against any adapters at strengths, on the same seeds",
    "text_to_video": "clips of a prompt: a motion and an appearance, each with its strength",
    "adapters": "what an adapter file is, where it loads, its norms and ranks; convert it",
}

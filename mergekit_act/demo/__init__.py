"""The demo: tiny models that learn and forget, and the commands that bring the forgotten ability back."""

from mergekit_act.demo.story import run_demo

__all__ = ["run_demo"]

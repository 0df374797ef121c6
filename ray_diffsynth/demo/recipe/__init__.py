"""How the shipped demo model was made: `python -m ray_diffsynth.demo.recipe STAGE…`, deterministic and resumable."""

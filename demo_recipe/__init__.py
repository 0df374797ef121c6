"""How the shipped demo model was made: `python -m demo_recipe STAGE…`, deterministic and resumable."""

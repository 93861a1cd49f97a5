"""Score a model by GenEval's six categories, on twelve prompts only: `gesso eval shapes` asks 600."""

import gesso
from gesso.evaluation.shapes import evaluate

with gesso.Engine() as engine:
    score = evaluate(engine, {"model": "infinity-nano"}, prompts=12)
for category, share in score.categories.items():
    print(f"{category}: {share.right} of {share.asked}")
print(f"overall {score.overall:.2f} in {score.seconds:.1f} s")

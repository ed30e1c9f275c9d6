"""Stage three: measure trained SAEs on held-out text and write metrics and tables.

held_out      blocks of text with what the model says of them
measure       faithfulness and activity of SAEs and controls, in one pass
sensitivity   Fig. 2                      perturbation   Fig. 3
fronts        Fig. 4                      steering       Figs. 5 and 6
density       Table 1, 4.3 and Fig. 8     splitting      Fig. 8 and Table 2
bootstrap     intervals                   claims         which of the paper's hold
sizes         whether model and text are enough for all of it
"""

from pipeline.evaluate.measure import evaluate_saes
from pipeline.evaluate.stage import check_origin, evaluate_runs, mean_activation

__all__ = ["check_origin", "evaluate_runs", "evaluate_saes", "mean_activation"]

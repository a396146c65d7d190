"""Evaluates the model during training."""

import math
from pathlib import Path

from tensorpack.callbacks import Callback
from tensorpack.utils import logger

import eval
from common.files import FileError, unused_path
from evaluation.metrics import EvaluationError
from inference.predictor import with_augmentation


class EvalCallback(Callback):
    """Evaluates every `period_epochs` epochs and after the last one, on all ranks together.

    Metrics go to the trainer's monitors as NAME-METRIC (NAME: the data set), results to OUTPUT_DIR/NAME-STEP.json.
    """

    _chief_only = False

    def __init__(
        self,
        settings,
        build_inference,
        datasets,
        *,
        period_epochs,
        output_dir,
        ranks,
        num_parallel,
        before_batch,
        offer,
        draw=None,
    ):
        """
        Args:
            settings: config.Config.
            build_inference: called while the graph is built; returns an object whose `bind(session)` is a `network`
                (see inference/graph.py) and whose `update(session)` gives it the present weights of the training.
            datasets: list of Datasets.
            period_epochs: 0 evaluates only after the last epoch.
            output_dir: folder for the results.
            ranks: Ranks, which share the work. num_parallel: number of threads that may call the network at once.
            before_batch: called before each batch; may raise, to end the training.
            offer: called with the name and the value of the first data set's AP, of masks if the model has them.
            draw: None, or a function (network, dataset) that yields (name, picture uint8 [H, W, 3] RGB) to show.
        """
        self._settings, self._build_inference = settings, build_inference
        self._datasets = datasets
        self._period = period_epochs
        self._output_dir = Path(output_dir)
        self._offer, self._draw = offer, draw
        self._options = {"ranks": ranks, "num_parallel": num_parallel, "before_batch": before_batch}

    def _setup_graph(self):
        self._inference = self._build_inference()

    def _before_train(self):
        self._network = with_augmentation(self._settings, self._inference.bind(self.trainer.sess))

    def _trigger_epoch(self):
        is_last = self.epoch_num == self.trainer.max_epoch
        if is_last or (self._period > 0 and self.epoch_num % self._period == 0):
            self._inference.update(self.trainer.sess)
            values = [self._evaluate(dataset) for dataset in self._datasets]
            if values and values[0] is not None:
                name = f"mAP({'segm' if self._settings.MODE_MASK else 'bbox'})/IoU=0.5:0.95"
                self._offer(f"{self._datasets[0].name}-{name}", values[0][name])

    def _evaluate(self, dataset):
        # A run that resumed from an earlier step may have evaluated this step before: those results stay.
        output = unused_path(self._output_dir / f"{dataset.name}-{self.global_step}.json")
        try:
            values = eval.evaluate_dataset(self._settings, self._network, dataset, output=output, **self._options)
        except (OSError, FileError, EvaluationError) as error:  # for example a full disk: the training continues
            if isinstance(error, EvaluationError) and not isinstance(error.__cause__, OSError):
                raise
            logger.warning(f"{dataset.name} could not be evaluated: {error}")
            return None
        for name, value in (values or {}).items():
            if not math.isnan(value):  # monitors accept no NaN; the log gives the reason for it
                self.trainer.monitors.put_scalar(f"{dataset.name}-{name}", value)
        if self._draw and self._options["ranks"].rank == 0:
            for name, picture in self._draw(self._network, dataset):
                self.trainer.monitors.put_image(name, picture)
        return values

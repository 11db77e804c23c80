"""The options of all programs and models."""

from variants import MODELS

import prepare_data
import sample
import train
from common.models import model_module
from experiments import look, study
from tools import estimate_memory, export, plot_loss
from tools.bench import __main__ as bench

OPTIONS = [
    train.TrainConfig,
    sample.SampleConfig,
    prepare_data.PrepareConfig,
    bench.BenchConfig,
    study.StudyConfig,
    look.LookConfig,
    plot_loss.PlotConfig,
    export.ExportConfig,
    estimate_memory.EstimateConfig,
    *(model_module(name).GPTConfig for name in MODELS),
]

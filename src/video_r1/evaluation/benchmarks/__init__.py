"""The benchmarks that `video-r1 eval --bench` knows, by name."""

from __future__ import annotations

from video_r1.evaluation.benchmarks.mmvu import MMVU
from video_r1.evaluation.benchmarks.mvbench import MVBENCH
from video_r1.evaluation.benchmarks.spec import Benchmark
from video_r1.evaluation.benchmarks.tempcompass import TEMPCOMPASS
from video_r1.evaluation.benchmarks.videoholmes import VIDEOHOLMES
from video_r1.evaluation.benchmarks.videomme import VIDEOMME
from video_r1.evaluation.benchmarks.videommmu import VIDEOMMMU
from video_r1.evaluation.benchmarks.vsibench import VSIBENCH

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (VSIBENCH, VIDEOMMMU, MMVU, MVBENCH, TEMPCOMPASS, VIDEOMME, VIDEOHOLMES)
}

"""T-GRPO as a plain loop, without a trainer: three steps on synthetic clips, or on a manifest of your own.

python examples/plain_loop.py [MODEL MANIFEST]
"""

import sys
import tempfile

import torch

from video_r1.data.manifests.records import load_manifest
from video_r1.data.prompts import PromptBuilder
from video_r1.data.reading import Reader, build_question, derived_generator
from video_r1.lab.clips import write_lab
from video_r1.lab.model import base_folder
from video_r1.models.loading import load_model, load_processor, size_multiple
from video_r1.rewards.scoring import reward_terms
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.commands import LabSettings
from video_r1.settings.frames import FrameBudget
from video_r1.settings.training import TGRPOSettings
from video_r1.training import step


def main(model: str = "", manifest: str = "", steps: int = 3, questions: int = 4) -> None:
    if not manifest:
        model, folder = str(base_folder()), tempfile.mkdtemp()
        write_lab(LabSettings(folder=folder, train=steps * questions, test=0, seed=1))
        manifest = f"{folder}/rl.json"
    settings = TGRPOSettings(num_generations=4, max_completion_length=64, beta=0.0, temporal_rule="margin")
    processor, policy = load_processor(model), load_model(model, "float32")
    budget = FrameBudget(max_frames=8, frame_pixels=56 * 56, size_multiple=size_multiple(processor))
    reader, prompts = Reader(budget), PromptBuilder(processor)
    terms, engine = reward_terms(None, settings), TransformersEngine(policy, processor)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    samples = load_manifest(manifest)
    for number in range(steps):
        asked = [
            build_question(one, reader.media(one), prompts, derived_generator(number, n), settings.contrast)
            for n, one in enumerate(samples[number * questions :][:questions])
        ]
        rollouts = step.compare(policy, step.sample(engine, asked, settings), settings)
        rewards = step.score(rollouts, terms, settings, prompts.question)
        groups = step.advantages(rollouts, rewards, settings)
        update = step.micro_batches(groups, [1] * len(groups), settings)
        for batch in update.batches:
            logprobs = step.logprobs_of(policy, batch, settings)
            references = step.References(logprobs.logprobs.detach())
            step.policy_loss(logprobs, batch, references, update, settings).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rewarded = torch.cat([one.total for one in rewards]).mean()
        print(f"step {number + 1}: mean reward {rewarded:.3f} of {len(groups)} questions")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2]) if len(sys.argv) > 2 else main()

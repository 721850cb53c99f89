"""Timesteps for few steps, found by a search instead of spaced evenly.

`scripts/optimize_timesteps` looks for the N timesteps whose samples are closest to those of 200 steps from
the same noise. One list that such a search found is stored here, and interpolated to other numbers of steps.
It spaces the steps more closely at both ends of a run than `timestep_spacing` does.

Measured on "tiny", guidance 2, 25 prompts that the search did not see. Root-mean-square distance of the
latents from those of 200 steps of DPM-Solver++, in percent of the latents, by default ("trailing") and with
these timesteps:

    steps            4             5             6             8            10            15
    UniPC         21.6 -> 20.4  17.3 -> 12.1  13.0 -> 10.3   8.1 -> 5.9   7.0 -> 3.0   5.1 -> 1.4
    DPM-Solver++  22.9 -> 18.9  18.5 -> 12.3  14.6 -> 10.6   9.6 -> 6.0   8.5 -> 4.2   5.6 -> 1.5

A few sounds that become others weigh most in these figures. By the median over the sounds, UniPC's distance
falls from 11.6 to 10.7 % at 5 steps, 10.6 to 7.9 at 6, 7.7 to 3.9 at 8 and 6.7 to 2.1 at 10, where 16, 21, 23
and 25 of the 25 sounds are closer. The search itself had 8 prompts, in padded batches, and the list for 8
steps was chosen among three by these 8 alone.

What is not known: whether they are as good for other checkpoints. Those of AudioLDM 2 have the same betas,
but "tiny" rescales them to end in pure noise. Up to timestep 500 the noise levels are the same within 3 %,
and at 849 they are a third higher; a network that learned real sounds may need its steps elsewhere as well.

Sabour et al. 2024 ("Align Your Steps") interpolate their lists in log sigma. Here the timestep itself is
interpolated, which was closer in 8 of 9 comparisons on the prompts of the search: in sigma, the list's first
and last timesteps would stay where they are at any number of steps.
"""

from __future__ import annotations

from audioldm2.arguments import check_count

MAX_STEPS = 50  # many more than the list was made for

# For UniPC in 8 steps. The end of the run, where no noise is left, counts as timestep -1.
FOUND = (999, 955, 849, 686, 493, 261, 64, 13, -1)


def optimized_timesteps(steps: int) -> list[int]:
    """Timesteps that lose less than even spacing, for a network that was trained with 1000 steps.

    Args:
        steps: N, from 1 to MAX_STEPS.

    Returns:
        N decreasing integers from 999 on, for `set_timesteps(timesteps=...)` of any sampler that takes them.

    Raises:
        ValueError: if N is not an integer from 1 to MAX_STEPS.

    Example:
        >>> optimized_timesteps(8)
        [999, 955, 849, 686, 493, 261, 64, 13]
        >>> optimized_timesteps(5)
        [999, 891, 647, 307, 44]
    """
    check_count("steps", steps, 1, MAX_STEPS)
    found = []
    for i in range(int(steps)):
        k, share = divmod(i * (len(FOUND) - 1) / int(steps), 1)
        found.append(round(FOUND[int(k)] + share * (FOUND[int(k) + 1] - FOUND[int(k)])))
    return found

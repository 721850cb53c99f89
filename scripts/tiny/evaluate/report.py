"""The scores as Markdown, and the blocks of the documents that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from audioldm2.atomic import replacing

# The columns of the table: their names in `evaluation.by_row` and their headings.
SCORE_COLUMNS = {"right": "right", "floor": "by chance", "ceiling": "real", "decoded": "decoded"}


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def score_report(result: dict[str, Any], *, steps: int, guidance: float, seed: int) -> str:
    """The scores in Markdown.

    Args:
        result: what `evaluate_command.evaluate` returns.
        steps: of the sampler, to be named.
        guidance: its scale, to be named.
        seed: to be named.
    """
    lines = [f"| sound | prompts | {' | '.join(SCORE_COLUMNS.values())} | what was wrong |"]
    lines.append("| --- | " + "---: | " * (len(SCORE_COLUMNS) + 1) + "--- |")
    for name, row in result["rows"].items():
        wrong = ", ".join(f"{k} {n}" for k, n in sorted(row["missed"].items(), key=lambda item: -item[1]))
        values = " | ".join(_percent(row[column]) for column in SCORE_COLUMNS)
        lines.append(f"| {name} | {row['prompts']} | {values} | {wrong} |")
    vae, vocoder, ranking = result["vae"], result["vocoder"], result.get("ranking")
    lines += [
        "",
        f"{steps} steps of DPM-Solver++, guidance {guidance:g}, seed {seed}. By chance: the clips judged by "
        "other prompts. Real: sounds synthesized for the prompts. Decoded: the real sounds through VAE and "
        "vocoder.",
        "",
        "| on unseen sounds | |",
        "| --- | ---: |",
        f"| VAE: mean error of the decoded log-mel spectrogram | {vae['vae_dB']:.2f} dB |",
        f"| vocoder: mean error of the log-mel spectrogram of its sound | {vocoder['mel_dB']:.2f} dB |",
        f"| both, one after the other | {vae['mel_dB']:.2f} dB |",
        f"| error of the level: vocoder, both | {vocoder['level_dB']:.2f} dB, {vae['level_dB']:.2f} dB |",
        f"| real sounds still right after the vocoder, after both | {_percent(vocoder['right'])}, "
        f"{_percent(result['rows']['all']['decoded'])} |",
        "| autocorrelation of noises within 36 ms: real, generated | "
        f"{result['repetition'][0]:.2f}, {result['repetition'][1]:.2f} |",
        f"| CLAP finds a caption's sound among one of each kind | {_percent(result['retrieval'])} |",
    ]
    if ranking:
        lines.append(
            f"| right, of {ranking['prompts']} prompts: CLAP's first of {ranking['candidates']} candidates, "
            f"without ranking, best possible | {100 * ranking['first']:.1f} %, {100 * ranking['any']:.1f} %, "
            f"{100 * ranking['possible']:.1f} % |"
        )
    return "\n".join(lines)


def replace_block(path: Path, name: str, text: str) -> None:
    """Replace what is between `<!-- name -->` and `<!-- /name -->` in a file.

    Raises:
        ValueError: the file does not have the two markers once each, in this order.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text(encoding="utf-8")
    if old.count(start) != 1 or old.count(end) != 1 or old.index(start) > old.index(end):
        raise ValueError(f"{path} must contain {start} once, and {end} once after it")
    before, after = old.split(start)[0], old.split(end)[1]
    with replacing(path.resolve()) as temporary:
        temporary.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")

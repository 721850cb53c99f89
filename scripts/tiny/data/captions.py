"""Scenes put into words: many phrasings, of which training never sees some.

    caption(scene, rng)                  "a loud church bell over falling rain"
    caption(scene, rng, held_out=True)   "The audio is a soft church bell with falling rain."

A caption names each sound (a noun), its trait and the scene's loudness (an adjective before the noun or a
phrase after it), inside a template ("the sound of ...", "... can be heard"). Held-out captions use templates,
word orders and ways of joining two sounds that occur in no training caption. Their vocabulary is that of the
training captions: a model that learns all its words here cannot know others.
"""

from __future__ import annotations

import numpy as np

from scripts.tiny.data.sounds import Scene, Sound

NOUNS: dict[str, tuple[str, ...]] = {
    "tone": ("a steady tone", "a continuous tone", "a sustained tone", "a steady note", "a long held note"),
    "sweep": ("a sweep", "a frequency sweep", "a gliding tone", "a glissando", "a glide"),
    "pulses": ("pulses", "beeps", "beeping", "a series of beeps", "a pulsing tone", "repeated beeps"),
    "clicks": ("clicks", "clicking", "ticking", "a series of clicks", "repeated ticks"),
    "siren": ("a siren", "a wailing siren", "an alarm siren", "an emergency siren", "a police siren"),
    "bell": ("a bell", "a ringing bell", "a church bell", "a bell ringing", "a big bell"),
    "pluck": ("a plucked string", "a guitar pluck", "a plucked guitar string", "a string being plucked"),
    "struck": ("a marimba note", "a struck marimba", "a xylophone note", "a wooden bar being struck"),
    "scale": ("a scale", "a musical scale", "a major scale", "notes of a scale"),
    "arpeggio": ("an arpeggio", "a broken chord", "an arpeggiated chord", "notes of an arpeggio"),
    "drums": ("drums", "a drum beat", "drumming", "a drum rhythm", "a beat on drums"),
    "noise": ("white noise", "static", "hiss", "static noise", "hissing noise"),
    "rain": ("rain", "rainfall", "falling rain", "a rain shower", "rain drops"),
    "wind": ("wind", "blowing wind", "wind blowing", "howling wind", "gusts of wind"),
    "waves": ("sea waves", "ocean waves", "waves on a beach", "waves of the sea", "surf"),
    "engine": ("an engine", "an engine hum", "a humming engine", "a motor", "an idling motor"),
    "birds": ("birds", "bird chirps", "chirping birds", "birds singing", "birdsong"),
}
# Words for a trait or a loudness, whichever kind of sound has it: before the noun, and after it.
ADJECTIVES: dict[str, tuple[str, ...]] = {
    "low": ("low", "deep", "low-pitched", "bass"),
    "middle": ("middle", "medium", "mid-range", "medium-pitched"),
    "high": ("high", "high-pitched", "shrill"),
    "rising": ("rising", "ascending", "upward", "climbing"),
    "falling": ("falling", "descending", "downward", "dropping"),
    "slow": ("slow", "unhurried", "leisurely"),
    "fast": ("fast", "rapid", "quick"),
    "loud": ("loud", "very loud", "strong", "powerful"),
    "soft": ("soft", "quiet", "faint", "gentle"),
}
PHRASES: dict[str, tuple[str, ...]] = {
    "low": ("with a low pitch", "at a low frequency"),
    "middle": ("with a medium pitch", "at a middle frequency"),
    "high": ("with a high pitch", "at a high frequency"),
    "rising": ("going up", "that rises in pitch", "from low to high"),
    "falling": ("going down", "that falls in pitch", "from high to low"),
    "slow": ("at a slow pace", "repeating slowly"),
    "fast": ("at a fast pace", "repeating quickly"),
    "loud": ("at high volume", "played loudly"),
    "soft": ("at low volume", "played softly"),
}
TEMPLATES = (
    "{}",
    "{}",
    "the sound of {}",
    "{} can be heard",
    "a recording of {}",
    "this is {}",
    "one hears {}",
    "the thing that you hear is {}",
    "there is {} here",
    "audio of {}",
    "listen to {}",
    "what a sound: {}",
)
HELD_OUT_TEMPLATES = (
    "listen to the sound of {}",
    "you hear {}",
    "a sound recording: {}",
    "here is {}",
    "the audio is {}",
    "what one hears is {}",
)
JOIN_TEMPLATES = (
    "{0} over {1}",
    "{0} with {1} in the background",
    "{0} and {1}",
    "{1} and {0}",
    "{0}, and there is {1}",
    "{0} while there is {1} behind",
)
HELD_OUT_JOIN_TEMPLATES = (
    "{0} and {1} in the background",
    "behind {0} there is {1}",
    "{0} with {1}",
    "over {1} {0}",
)


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _qualified(noun: str, words: list[str]) -> str:
    """Put adjectives between a noun and its article, and choose between "a" and "an"."""
    article, _, rest = noun.partition(" ")
    if article not in ("a", "an"):
        return " ".join([*words, noun])
    rest = " ".join([*words, rest])
    return f"{'an' if rest[0] in 'aeiou' and not rest.startswith('one') else 'a'} {rest}"


def describe(sound: Sound, loudness: str, rng: np.random.Generator, held_out: bool) -> str:
    """A phrase for one sound.

    Args:
        sound: what to name.
        loudness: "loud", "soft", or "" to leave it out.
        rng: chooses among the phrasings.
        held_out: put the loudness between the trait and the noun, which no training caption does.
    """
    before: list[str] = []
    after: list[str] = []
    for quality in (loudness, sound.trait):
        if not quality:
            continue
        if rng.random() < 0.7:
            before.append(_choose(rng, ADJECTIVES[quality]))
        else:
            after.append(_choose(rng, PHRASES[quality]))
    if held_out:
        before.reverse()
    elif len(after) == 2 and rng.random() < 0.5:
        after.reverse()
    return " ".join([_qualified(_choose(rng, NOUNS[sound.kind]), before), *after])


def caption(scene: Scene, rng: np.random.Generator, held_out: bool = False) -> str:
    """A caption of a scene.

    Args:
        scene: what to describe.
        rng: chooses among the phrasings.
        held_out: use only phrasings that occur in no training caption.
    """
    phrases = [
        describe(sound, scene.loudness if i == 0 else "", rng, held_out)
        for i, sound in enumerate(scene.sounds)
    ]
    text = phrases[0]
    if len(phrases) == 2:
        text = _choose(rng, HELD_OUT_JOIN_TEMPLATES if held_out else JOIN_TEMPLATES).format(*phrases)
    text = _choose(rng, HELD_OUT_TEMPLATES if held_out else TEMPLATES).format(text)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + _choose(rng, ("", "."))

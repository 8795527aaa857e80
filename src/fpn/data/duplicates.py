"""Pictures that are the same, or nearly: found by a hash of their coarse look, confirmed on their thumbnails.

The hash is made of signs of low frequencies of the discrete cosine transform, which survive compression, resizing and
changes of brightness (after C. Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010). It
only proposes pairs; pictures that share a coarse look, such as fields of view of one microscope, are told apart after.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped, UInt8, UInt64

# Chosen on 310 photographs and micrographs and 260 patches and textures. Copies (JPEG at quality 30, half the size, 15%
# brighter) are within 6 bits in 99 of 100 cases; only 1 in 100 pairs of different pictures is within 22.
DISTANCE = 6  # bits of 64 in which the hashes of a proposed pair may differ
# Copies correlate by 0.95 or more, the most similar different pictures by 0.76.
CORRELATION = 0.95
COARSE_CORRELATION = 0.9  # of the thumbnails at 8x8, which is quick to see
# Standard deviations by which a spot may stick out of the other picture's spots around it: nearly all copies stay below
# 1.0, different pictures start at 1.7. It keeps apart what differs in one place only, such as frames of a fixed camera.
DEVIATION = 1.0
FLAT = 1.0  # grey levels of standard deviation; below, a picture is too empty to be compared
REACH = 64  # pictures with which each is compared of those that share two bytes of its hash
BLOCK = 256  # thumbnails worked on at once: what fits a core's cache


def perceptual_hashes(thumbnails: UInt8[np.ndarray, "N S S"]) -> UInt64[np.ndarray, " N"]:
    """64 bits a thumbnail: the signs of its 64 lowest frequencies but the mean, the lowest in the lowest bit.

    >>> ramp = np.arange(0, 256, 8, dtype=np.uint8)
    >>> sideways = np.tile(ramp, (32, 1))  # brighter to the right: the first frequency along x is negative
    >>> [int(code) for code in perceptual_hashes(np.stack([sideways, 255 - sideways])) & 3]
    [0, 1]
    """
    side = thumbnails.shape[1]
    waves = np.cos(np.pi / side * np.outer(np.arange(11), np.arange(side) + 0.5))  # DCT-II, rows are frequencies
    pairs = sorted(((y, x) for y in range(11) for x in range(11)), key=lambda pair: (sum(pair), pair))[1:65]
    rows, columns = np.array(pairs).T
    bits = np.empty((len(thumbnails), 64), dtype=bool)
    for start in range(0, len(thumbnails), BLOCK):
        block = slice(start, start + BLOCK)
        spectra = waves @ thumbnails[block].astype(np.float64) @ waves.T
        bits[block] = spectra[:, rows, columns] > 1e-6  # not 0: what is empty is not left to rounding
    return np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0].astype(np.uint64)


def close_pairs(hashes: UInt64[np.ndarray, " N"]) -> Int64[np.ndarray, "P 2"]:
    """The pairs i < j whose hashes differ in at most `DISTANCE` bits, without comparing all with all.

    Six bits touch at most six of the eight bytes, so that two bytes are equal: pictures are sorted by each two bytes
    and compared with those that follow. Where more than `REACH` share both bytes, the farther ones are passed over.
    """
    n = len(hashes)
    columns = hashes.astype("<u8").view(np.uint8).reshape(n, 8).astype(np.uint16)
    found = np.empty(0, dtype=np.int64)
    for first, second in combinations(range(8), 2):
        keys = columns[:, first] << 8 | columns[:, second]
        order = np.lexsort((hashes, keys))
        keys, codes = keys[order], hashes[order]
        new = [found]
        for lag in range(1, min(REACH + 1, n)):
            same = np.flatnonzero(keys[lag:] == keys[:-lag])
            if not len(same):
                break
            same = same[np.bitwise_count(codes[same] ^ codes[same + lag]) <= DISTANCE]
            one, other = order[same], order[same + lag]
            new.append(np.minimum(one, other) * n + np.maximum(one, other))
        found = np.sort(np.concatenate(new))  # np.unique takes minutes for millions of such numbers
        found = found[np.diff(found, prepend=-1) > 0]
    return np.stack([found // max(n, 1), found % max(n, 1)], axis=1)


def near_pairs(thumbnails: UInt8[np.ndarray, "N S S"]) -> Int64[np.ndarray, "P 2"]:
    """The pairs i < j of thumbnails that show the same picture. Sides are a multiple of 8."""
    pairs = close_pairs(perceptual_hashes(thumbnails))
    n, step = len(thumbnails), thumbnails.shape[1] // 8
    coarse = thumbnails.reshape(n, 8, step, 8, step).mean(axis=(2, 4), dtype=np.float32)
    coarse = _standardised(coarse)[0].reshape(n, 64)
    kept = [pairs[:0]]
    for start in range(0, len(pairs), 64 * BLOCK):
        block = pairs[start : start + 64 * BLOCK]
        likely = (coarse[block[:, 0]] * coarse[block[:, 1]]).mean(axis=1) >= COARSE_CORRELATION
        kept.append(block[likely])  # few remain, which are looked at closely
    pairs = np.concatenate(kept)
    kept = [pairs[:0]]
    for start in range(0, len(pairs), BLOCK):
        block = pairs[start : start + BLOCK]
        kept.append(block[alike(thumbnails[block[:, 0]], thumbnails[block[:, 1]])])
    return np.concatenate(kept)


def alike(a: UInt8[np.ndarray, "P S S"], b: UInt8[np.ndarray, "P S S"]) -> Bool[np.ndarray, " P"]:
    """Whether the thumbnails of each pair show the same picture, whatever their brightness and contrast."""
    a, flat_a = _standardised(a)
    b, flat_b = _standardised(b)
    correlated = (a * b).mean(axis=(1, 2)) >= CORRELATION
    everywhere = (_sticking_out(a, b) <= DEVIATION) & (_sticking_out(b, a) <= DEVIATION)
    return correlated & everywhere & ~flat_a & ~flat_b


def _standardised(images: Shaped[np.ndarray, "P S S"]) -> tuple[Float[np.ndarray, "P S S"], Bool[np.ndarray, " P"]]:
    """The images with mean 0 and deviation 1, and which of them are too flat for that to mean anything."""
    deviation = images.std(axis=(1, 2), keepdims=True, dtype=np.float32)
    values = (images - images.mean(axis=(1, 2), keepdims=True, dtype=np.float32)) / np.maximum(deviation, FLAT)
    return values, deviation[:, 0, 0] < FLAT


def _sticking_out(a: Float[np.ndarray, "P S S"], b: Float[np.ndarray, "P S S"]) -> Float[np.ndarray, " P"]:
    """The most by which a spot of `a` leaves the range of the 3x3 spots around it in `b`: 0 for a shift by one spot."""
    low, high = _around(b, np.minimum), _around(b, np.maximum)
    return np.maximum(a - high, low - a).max(axis=(1, 2))


def _around(values: Float[np.ndarray, "P S S"], extreme: np.ufunc) -> Float[np.ndarray, "P S S"]:
    """The lowest or highest of each spot and the eight around it."""
    values = np.pad(values, ((0, 0), (1, 1), (1, 1)), mode="edge")
    values = extreme(extreme(values[:, :-2], values[:, 1:-1]), values[:, 2:])
    return extreme(extreme(values[:, :, :-2], values[:, :, 1:-1]), values[:, :, 2:])

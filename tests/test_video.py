"""Videos: frames as they are displayed, detections of each in JSON, what was found drawn on them."""

import json
import signal
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from fpn.errors import DataError, FpnError, OptionError
from fpn.inference import frames as frames_module
from fpn.inference.frames import Writer, opened, turned
from fpn.inference.tracking import Tracks
from fpn.inference.video import predict_video
from fpn.structures import Detections

av = pytest.importorskip("av")

RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (20, 30, 230)


def scene(at, size=(48, 64)):
    """A grey picture with a red square, from (at, 8) to (at + 12, 20)."""
    pixels = np.full((*size, 3), 90, np.uint8)
    pixels[8:20, at : at + 12] = RED
    return pixels


def write(path, pictures, times=None, codec="libx264", rotation=None, **options):
    """A video of these pictures, 25 a second or at these seconds."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(**rotation)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts = round(1000 * (times[number] if times else number / 25))
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path):
    with opened(path) as video:
        return list(video)


def some(rows):
    """Detections of (x1, y1, x2, y2, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    levels = torch.full((len(table),), 2)
    return Detections(
        table[:, :4], table[:, 4], table[:, 5].long(), levels, torch.tensor(len(table)), ("square", "other")
    )


def reddest(images):
    """A finder of the red square; it also finds, with score 0.2, the whole image."""
    answers = []
    for image in images:
        row, column = torch.where((image[0] > 150) & (image[1] < 90))
        box = (int(column.min()), int(row.min()), int(column.max()) + 1, int(row.max()) + 1)
        answers.append(some([(*box, 0.9, 0), (0, 0, image.shape[2], image.shape[1], 0.2, 1)]))
    return answers


@pytest.fixture
def clip(tmp_path):
    return write(tmp_path / "clip.mp4", [scene(4 * k) for k in range(10)])


def test_every_frame_is_in_the_json_and_drawn_on_in_the_video(clip, tmp_path):
    sizes = []

    def find(images):
        sizes.append(len(images))
        return reddest(images)

    result = predict_video(find, clip, tmp_path / "out", batch=4, about={"checkpoint": "a.safetensors"}, progress=False)
    assert sizes == [4, 4, 2]
    assert (result.frames, result.objects, result.tracks, result.complete) == (10, 10, None, True) and not result.notes
    content = json.loads(result.rows.read_text())
    assert list(content)[:2] == ["video", "checkpoint"] and content["complete"] and content["frames_per_second"] == 25
    assert len(result.rows.read_text().splitlines()) == 12  # a head, a line for each frame, a tail
    for number, row in enumerate(content["frames"]):
        assert row["frame"] == number and row["seconds"] == pytest.approx(number / 25, abs=1e-3)
        (detection,) = row["detections"]
        assert detection["class"] == "square" and (row["height"], row["width"]) == (48, 64)
        np.testing.assert_allclose(detection["box"], [4 * number, 8, 4 * number + 12, 20], atol=2)
    assert result.picture == tmp_path / "out/clip.mp4"
    drawn = read(result.picture)
    assert len(drawn) == 10
    for number, (image, seconds) in enumerate(drawn):
        assert seconds == pytest.approx(number / 25, abs=1e-3)
        mean = image[:, 40:, :].float().mean((1, 2))
        assert (mean - 90).abs().max() < 6  # nothing is drawn there, and grey stays as grey as it was
        blue = (image[2].int() - image[0].int() > 60).nonzero()  # the colour of the first class
        assert 100 < len(blue) < 900 and (blue[:, 0] < 36).all()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["clip.json", "clip.mp4"]


def test_json_alone_and_another_name(clip, tmp_path):
    result = predict_video(reddest, clip, tmp_path, 0.1, name="two", pictures=False, progress=False)
    assert result.picture is None and result.rows == tmp_path / "two.json" and result.objects == 20
    with pytest.raises(OptionError, match="would be overwritten"):
        predict_video(reddest, clip, tmp_path, progress=False)
    for wrong in ({"threshold": 1.5}, {"batch": 0}):
        with pytest.raises(OptionError, match=f"{list(wrong)[0]} is"):
            predict_video(reddest, clip, tmp_path / "out", progress=False, **wrong)
    assert not (tmp_path / "out").exists()


def test_a_file_name_that_is_not_utf_8(clip, tmp_path):
    source = tmp_path / "clip\udcff.mp4"
    try:
        clip.rename(source)
    except (OSError, UnicodeError):
        pytest.skip("names of files are UTF-8 here")
    result = predict_video(reddest, source, tmp_path / "out", progress=False)
    assert result.picture is not None and len(read(result.picture)) == 10
    assert json.loads(result.rows.read_text())["video"] == str(source)


def test_errors_of_writing_name_the_file_that_is_wanted(tmp_path):
    writer = Writer(tmp_path / ".x.mp4.tmp", 25.0, name=tmp_path / "x.mp4")
    with pytest.raises(FpnError, match=r"/x.mp4: pictures of \(70000, 2\) cannot be encoded"):
        writer.add(Image.new("RGB", (70_000, 2)), 0.0)


def test_frames_keep_their_times_and_odd_sides(tmp_path):
    times = [0.0, 0.04, 0.5, 0.54, 2.0]
    source = write(tmp_path / "slow.mkv", [scene(4 * k, (46, 64)) for k in range(5)], times)
    writer = Writer(tmp_path / "odd.mp4", 25.0, Fraction(4, 3))
    from PIL import Image

    for pixels, seconds in read(source):
        writer.add(Image.fromarray(pixels[:, :45, :63].permute(1, 2, 0).numpy()), seconds)
    writer.add(Image.new("RGB", (200, 100), BLUE), 2.5)  # of another size: brought to the first's
    writer.close()
    writer.close()
    with opened(tmp_path / "odd.mp4") as video:
        assert video.pixel_aspect == Fraction(4, 3)
        again = list(video)
    np.testing.assert_allclose([seconds for _, seconds in again], [*times, 2.5], atol=1e-3)
    assert {tuple(image.shape) for image, _ in again} == {(3, 46, 64)}
    assert (again[-1][0].float().mean((1, 2)) - torch.tensor(BLUE)).abs().max() < 6


@pytest.mark.parametrize("turn", range(8))
def test_every_display_matrix(turn):
    """The matrix says where the pixel at (x, y) goes; here each is sent there by itself."""
    one = 65536
    a, b, c, d = [
        *[(one, 0, 0, one), (-one, 0, 0, one), (one, 0, 0, -one), (-one, 0, 0, -one)],
        *[(0, one, one, 0), (0, -one, one, 0), (0, one, -one, 0), (0, -one, -one, 0)],
    ][turn]
    matrix = np.array([[a, b, 0], [c, d, 0], [0, 0, 2**30]], np.int32)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    places = {(y, x): ((b * x + d * y) // one, (a * x + c * y) // one) for y in range(3) for x in range(5)}
    top, left = (min(place[axis] for place in places.values()) for axis in (0, 1))
    result = turned(pixels, matrix)
    assert result.shape == ((3, 5, 3) if turn < 4 else (5, 3, 3))
    for source, (row, column) in places.items():
        assert (result[row - top, column - left] == pixels[source]).all()


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write such videos")
def test_a_video_of_a_phone_held_upright_is_upright(tmp_path):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[:16, 32:], picture[16:, :32] = RED, GREEN, BLUE
    source = write(tmp_path / "turned.mp4", [picture] * 3, rotation={"degrees": 90})
    image = read(source)[0][0]
    assert image.shape == (3, 64, 32)
    # Turned counterclockwise: the right end of the first row is at the top left.
    for place, colour in (((8, 8), GREEN), ((56, 8), RED), ((56, 24), BLUE), ((8, 24), (0, 0, 0))):
        assert (image[:, *place].int() - torch.tensor(colour)).abs().max() < 12
    result = predict_video(lambda images: [some([])] * len(images), source, tmp_path / "out", progress=False)
    assert result.picture is not None and read(result.picture)[0][0].shape == (3, 64, 32)


def test_what_is_no_video_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    whole = write(tmp_path / "whole.mp4", [scene(k) for k in range(20)]).read_bytes()
    (tmp_path / "head.mp4").write_bytes(whole[: len(whole) // 2])  # the table of contents stands at its end
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    reasons = {"empty": "not a video", "text": "not a video", "head": "cut off", "sound": "audio", "missing": "no such"}
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=f"{name}.mp4: .*{reason}"):
            predict_video(reddest, tmp_path / f"{name}.mp4", tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="webcam:97: is the camera there"):
        predict_video(reddest, "webcam:97", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_video_without_a_frame(tmp_path):
    whole = write(tmp_path / "whole.mp4", [scene(k) for k in range(20)], options={"movflags": "faststart"}).read_bytes()
    start = whole.index(b"mdat") + 4
    (tmp_path / "none.mp4").write_bytes(whole[:start])
    with pytest.raises(DataError, match="none.mp4: there is no frame in it"):
        predict_video(reddest, tmp_path / "none.mp4", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_of_a_video_that_is_cut_off_or_damaged_the_rest_is_used(tmp_path):
    noise = np.random.default_rng(0).integers(0, 150, (60, 48, 64, 3)).astype(np.uint8)
    pictures = [np.maximum(scene(k % 40), part) for k, part in enumerate(noise)]
    whole = write(tmp_path / "whole.mp4", pictures, options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    result = predict_video(reddest, tmp_path / "half.mp4", tmp_path / "out", progress=False)
    assert 15 < result.frames < 45 and not result.complete
    assert any("it is cut off" in note for note in result.notes)
    content = json.loads(result.rows.read_text())
    assert not content["complete"] and len(content["frames"]) == result.frames and content["notes"] == result.notes
    assert result.picture is not None and len(read(result.picture)) == result.frames

    holed = bytearray(whole)
    third = len(holed) // 3
    holed[third : third + 3000] = b"\xff" * 3000
    (tmp_path / "holed.mp4").write_bytes(holed)
    result = predict_video(
        lambda images: [some([])] * len(images), tmp_path / "holed.mp4", tmp_path, name="x", progress=False
    )
    assert 20 < result.frames < 60 and result.complete and any("damaged parts" in note for note in result.notes)


def test_ctrl_c_leaves_whole_files_of_the_frames_until_then(clip, tmp_path):
    seen = []

    def find(images):
        seen.extend(images)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGINT)
        return reddest(images)

    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after 4 frames, which are in .*clip.mp4"):
        predict_video(find, clip, tmp_path / "out", progress=False)
    assert signal.getsignal(signal.SIGINT) is usual
    content = json.loads((tmp_path / "out/clip.json").read_text())
    assert len(content["frames"]) == 4 and not content["complete"]
    assert len(read(tmp_path / "out/clip.mp4")) == 4


def test_a_second_ctrl_c_leaves_nothing(clip, tmp_path):
    def find(images):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return reddest(images)

    with pytest.raises(KeyboardInterrupt):
        predict_video(find, clip, tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_camera_is_read_until_ctrl_c(tmp_path, monkeypatch):
    source = ("testsrc=size=64x48:rate=30", {"format": "lavfi"})  # pictures without an end
    monkeypatch.setattr(frames_module, "camera", lambda name: source)
    sizes = []

    def find(images):
        sizes.append(len(images))
        if len(sizes) == 5:
            signal.raise_signal(signal.SIGINT)
        return [some([(1, 2, 30, 40, 0.9, 0)])] * len(images)

    result = predict_video(find, "webcam:0", tmp_path, batch=8, progress=False)
    assert result.frames == 5 and result.complete and sizes == [1] * 5
    assert result.rows.name == "webcam-0.json" and result.picture is not None and len(read(result.picture)) == 5


def test_cameras_have_other_names_on_other_systems(monkeypatch):
    names = {"linux": "/dev/video0", "darwin": "0", "win32": "video=0"}
    for system, name in names.items():
        monkeypatch.setattr(sys, "platform", system)
        assert frames_module.camera("0")[0] == name


def test_objects_keep_their_numbers():
    pytest.importorskip("trackers")
    tracks = Tracks(0.5, 25.0)
    numbers = []
    for k in range(12):
        one, two = (10 + 3 * k, 10, 40 + 3 * k, 40), (200 - 3 * k, 12, 230 - 3 * k, 42)
        rows = [(*one, 0.9, 0), (*two, 0.8, 1)]
        if k >= 6:  # partly hidden; and with the same score something new, that nobody follows
            rows[0] = (*one, 0.2, 0)
            rows.append((300, 300, 320, 320, 0.2, 0))
        rows.sort(key=lambda row: -row[4])
        shown, ids = tracks.follow(some(rows))
        assert len(shown) == len(ids) == 2
        assert [label for _, label in sorted(zip(ids, shown.labels.tolist(), strict=True), key=str)] == [0, 1]
        numbers.append({label: number for label, number in zip(shown.labels.tolist(), ids, strict=True)})
    assert numbers[0] == {0: None, 1: None} and numbers[1:] == [{0: 1, 1: 2}] * 11
    assert tracks.count == 2


def test_an_object_that_comes_back_late_is_a_new_one():
    pytest.importorskip("trackers")
    for away, number in ((10, 1), (60, 2)):
        tracks = Tracks(0.5, 25.0)
        for _ in range(5):
            assert tracks.follow(some([(10, 10, 40, 40, 0.9, 0)]))[1] in ([None], [1])
        for _ in range(away):
            assert tracks.follow(some([]))[1] == []
        tracks.follow(some([(10, 10, 40, 40, 0.9, 0)]))
        assert tracks.follow(some([(10, 10, 40, 40, 0.9, 0)]))[1] == [number]


def test_tracks_are_in_the_json(clip, tmp_path):
    pytest.importorskip("trackers")
    result = predict_video(reddest, clip, tmp_path / "out", track=True, progress=False)
    content = json.loads(result.rows.read_text())
    assert [[d["track"] for d in row["detections"]] for row in content["frames"]] == [[None]] + [[1]] * 9
    assert result.tracks == 1


def test_missing_packages_are_named(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(OptionError, match=r"pip install 'fpn\[track\]'"):
        predict_video(reddest, clip, tmp_path / "out", track=True, progress=False)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OptionError, match=r"pip install 'fpn\[video\]'"):
        predict_video(reddest, clip, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()

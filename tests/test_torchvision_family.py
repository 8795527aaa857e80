"""All of torchvision's detectors with a feature pyramid: the same numbers from the same weights, there and back."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from test_torchvision_parity import WIDE, agree_but_for_ties, pixels
from torch import nn
from torchvision.models import WeightsEnum, detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList

import fpn
from fpn.errors import CheckpointError
from fpn.structures import Batch, Targets
from fpn.weights.checkpoint import is_detector
from fpn.weights.published import published
from fpn.weights.torchvision import from_torchvision, to_torchvision
from fpn.weights.torchvision_names import NEVER

CLASSES = 6
SIZES = [(96, 128), (80, 101)]
# A few modest layers away from what the other tests already run: the mobile and the second versions are the slowest.
MODELS = [
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    pytest.param("fasterrcnn_resnet50_fpn", marks=pytest.mark.slow),
    pytest.param("fasterrcnn_resnet50_fpn_v2", marks=pytest.mark.slow),
    pytest.param("retinanet_resnet50_fpn_v2", marks=pytest.mark.slow),
    pytest.param("maskrcnn_resnet50_fpn", marks=pytest.mark.slow),
]
LOSSES = {
    "rpn_class": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "class": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
}
DENSE_LOSSES = {"class": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"}


def lively(name: str, seed: int = 0) -> nn.Module:
    """torchvision's model with random weights and running statistics that detect something of every class."""
    torch.manual_seed(seed)
    regions = (
        {}
        if name.startswith(("fcos", "retinanet"))
        else {
            "rpn_batch_size_per_image": WIDE,
            "box_batch_size_per_image": WIDE,
            "rpn_post_nms_top_n_train": 100,
            "rpn_post_nms_top_n_test": 100,
            "box_positive_fraction": 0.5,
        }
    )
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **regions)
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("cls_", "bbox_", "mask_fcn_logits")):
            nn.init.normal_(parameter, std=0.05)
        elif "_head.conv." in key and parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.0)
    if not regions:  # the class that stands for background in name only
        model.head.classification_head.cls_logits.bias.data.view(-1, CLASSES + 1)[:, 0] = NEVER
    if name.startswith("fcos"):
        nn.init.ones_(model.head.regression_head.bbox_reg.bias)  # most boxes have an area
    return model.eval()


class AsTheyAre(nn.Module):
    """In the place of torchvision's transform: images that need none, and results in their pixels."""

    def __init__(self, images: ImageList):
        super().__init__()
        self.images = images

    def forward(self, images, targets=None):
        return self.images, targets

    def postprocess(self, result, *_):
        return result


@pytest.mark.parametrize("name", MODELS)
def test_maps_detections_and_losses_are_torchvisions(name):
    peer = lively(name)
    ours = from_torchvision(peer)
    batch, normal = pixels(SIZES[0], SIZES)
    peer.transform = AsTheyAre(ImageList(normal, SIZES))
    with torch.no_grad():
        pyramid, maps = ours.features(batch), peer.backbone(normal)
        detections, results = ours.detect(batch), peer(list(normal))
    assert len(maps) == len(pyramid)
    for theirs, mine in zip(maps.values(), pyramid.values(), strict=True):
        assert (theirs - mine).abs().max() < 1e-4 * theirs.abs().max()
    for i, result in enumerate(results):
        # torchvision's one-stage models keep boxes with nothing left in the image, and count them.
        real = ((result["boxes"][:, 2:] - result["boxes"][:, :2]) >= 1e-2).all(1)
        result = {key: value[real] for key, value in result.items()}
        mine, count = detections[i], int(real.sum())
        assert count > 20 and len(mine) >= count
        boxes, scores, labels = mine.boxes[:count], mine.scores[:count], mine.labels[:count]
        agree_but_for_ties(boxes, scores, result["boxes"], result["scores"], tie=2e-5)
        assert (labels + 1 == result["labels"]).float().mean() > 0.95  # all but tied ones
        if "masks" in result:
            assert mine.masks is not None and len(mine) == count
            same = (boxes - result["boxes"]).abs().amax(1) < 1e-2
            torch.testing.assert_close(mine.masks[same], result["masks"][same, 0], atol=1e-4, rtol=0)
    losses_agree(peer, ours, batch, normal)
    state = to_torchvision(ours)
    peer.load_state_dict(state, strict=True)
    again = from_torchvision(state, norm_eps=ours.spec.norm_eps, name=name)
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))


def losses_agree(peer: nn.Module, ours: nn.Module, batch: Batch, normal: torch.Tensor) -> None:
    boxes = torch.tensor([[[5.0, 8, 60, 71], [40, 10, 66, 33], [20, 5, 100, 79]]]).repeat(2, 1, 1)
    labels = torch.tensor([[0, 3, 5], [2, 2, 1]])
    masks = (torch.rand(2, 3, *SIZES[0], generator=torch.Generator().manual_seed(3)) < 0.5).to(torch.uint8)
    masked = hasattr(peer, "roi_heads") and peer.roi_heads.has_mask()
    targets = Targets(boxes, labels, torch.ones_like(labels, dtype=torch.bool), masks=masks if masked else None)
    theirs = [{"boxes": b, "labels": k + 1, "masks": m} for b, k, m in zip(boxes, labels, masks, strict=True)]
    peer.train()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        mine = ours.losses(Batch(batch.images, batch.sizes, batch.original_sizes, batch.indices, targets))
        wanted = peer(list(normal), theirs)
    names = LOSSES if hasattr(peer, "roi_heads") else DENSE_LOSSES
    assert {names[term] for term in mine} == wanted.keys()
    for term, value in mine.items():
        assert abs(value - wanted[names[term]]) < 1e-4 * max(1, abs(value)), term


# Options that make a small detector of ours as torchvision would have it.
HABITS = {"whole_pixels": True, "floor_stride": True, "backbone": "resnet18", "width": 32, "classes": ["a", "b", "c"]}
TWO_STAGES = {**HABITS, "pooling": "align_v1", "hidden": 32}
KINDS = {
    "faster_rcnn": TWO_STAGES,
    "mask_rcnn": TWO_STAGES | {"norm": "batch", "box_convolutions": 2, "box_norm": "batch", "mask_norm": "batch"},
    "retinanet": HABITS | {"extra": "c5", "tower_norm": "group"},
    "fcos": HABITS | {"distances": "relu", "anchor_offset": 0.0},
}


def small(model: str, **options) -> fpn.model.detector.Detector:
    torch.manual_seed(0)
    detector = fpn.build(model, weights="none", **{**KINDS[model], **options})
    for tensor in detector.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    return detector


@pytest.mark.parametrize("model", KINDS)
def test_there_and_back_bit_by_bit(model):
    ours = small(model)
    again = from_torchvision(to_torchvision(ours), ours.classes)
    state, wanted = again.state_dict(), ours.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)
    for name in ("model", "backbone", "width", "levels", "extra", "norm", "hidden", "tower_norm", "mask_norm"):
        assert getattr(again.spec, name) == getattr(ours.spec, name)


@pytest.mark.parametrize(
    "model, options, reason",
    [
        ("faster_rcnn", {"fuse": "average"}, "fuse is average, not sum"),
        ("faster_rcnn", {"pooling": "align"}, "pooling is align, not align_v1"),
        ("faster_rcnn", {"backbone": "tiny"}, "backbone tiny"),
        (
            "faster_rcnn",
            {"levels": (2, 7), "bgr": True},
            "bgr is True, not False; 2 levels above the backbone's by pool",
        ),
        ("retinanet", {"floor_stride": False}, "floor_stride is False, not True"),
        ("fcos", {"distances": "exp"}, r"distances is exp, not relu; it has nothing like the tensor head\.scales\.3"),
        ("fcos", {"neck": "pafpn"}, "neck is pafpn, not fpn"),
        ("retinanet", {"top_down": False}, "top_down is False, not True"),  # its tensors have the same names
    ],
)
def test_what_torchvision_has_no_model_for_is_told(model, options, reason):
    with pytest.raises(CheckpointError, match=f"torchvision has no model like this {model}: .*{reason}"):
        to_torchvision(small(model, **options))


def test_a_model_brings_its_settings():
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    anchors = AnchorGenerator(tuple((side, 2 * side) for side in (8, 16, 32, 64, 128)), ((0.5, 1.0),) * 5)
    peer = detection.FasterRCNN(
        backbone,
        4,
        min_size=256,
        max_size=500,
        image_mean=[0.1, 0.2, 0.3],
        rpn_anchor_generator=anchors,
        rpn_post_nms_top_n_test=50,
        box_detections_per_img=7,
        box_score_thresh=0.5,
        bbox_reg_weights=(1.0, 2.0, 3.0, 4.0),
    )
    ours = from_torchvision(peer, score=0.25)
    assert ours.spec.backbone == "resnet18" and ours.spec.sides == (256, 500)
    assert ours.spec.anchor_sizes == (8, 16, 32, 64, 128) and ours.spec.anchor_scales == (1, 2)
    assert (ours.proposals, ours.max_detections, ours.score) == ((2000, 50), 7, 0.25)
    assert ours.box_weights == (1, 2, 3, 4) and ours.spec.settings["mean"] == (0.1, 0.2, 0.3)
    peer.rpn.anchor_generator = AnchorGenerator(((8,), (16,), (32,), (64,), (128, 200)), ((0.5, 1.0),) * 5)
    with pytest.raises(CheckpointError, match=r"anchors of sizes .*\(128, 200\)"):
        from_torchvision(peer)


def test_what_does_not_fit_is_listed_in_one_error():
    state = to_torchvision(small("fcos"))
    state.pop("head.regression_head.bbox_reg.bias")
    state["more"] = torch.zeros(1)
    state["head.regression_head.conv.0.bias"] = torch.zeros(31)
    with pytest.raises(CheckpointError) as raised:
        from_torchvision(state)
    assert str(raised.value) == (
        "torchvision's weights: 3 tensors are not those of torchvision's fcos with resnet18: "
        "head.regression_head.bbox_reg.bias is missing; "
        "head.regression_head.conv.0.bias has shape (31,), not (32,); more is unknown"
    )


@pytest.mark.parametrize(
    "key, wrong",
    [
        ("backbone.fpn.inner_blocks.0.0.weight", torch.zeros(2, 3)),
        ("backbone.fpn.extra_blocks.p6.weight", torch.zeros(())),
        ("head.classification_head.cls_logits.weight", torch.zeros(1)),
        ("head.regression_head.bbox_reg.weight", torch.zeros(())),
        ("backbone.body.layer1.0.conv2.weight", torch.zeros(64)),
    ],
)
def test_any_shape_can_be_read_and_refused(key, wrong):
    state = to_torchvision(small("retinanet"))
    with pytest.raises(CheckpointError, match="has shape|no detector can be built|its backbone is none of"):
        from_torchvision({**state, key: wrong})


def test_other_architectures_are_refused():
    keypoints = {
        "backbone.fpn.inner_blocks.0.0.weight": torch.zeros(1),
        "roi_heads.keypoint_predictor.x": torch.zeros(1),
    }
    with pytest.raises(CheckpointError, match="not torchvision's Faster R-CNN, Mask R-CNN, RetinaNet or FCOS"):
        from_torchvision(keypoints)
    state = to_torchvision(small("fcos"))
    other = {key: value for key, value in state.items() if "layer4.1" not in key}
    with pytest.raises(CheckpointError, match="its backbone is none of resnet18, resnet34"):
        from_torchvision(other)


def test_a_one_stage_model_without_background_keeps_all_its_classes():
    state = to_torchvision(small("retinanet"))
    ours = from_torchvision(state, ["zero", "a", "b", "c"])
    assert ours.classes == ("zero", "a", "b", "c")
    assert torch.equal(ours.head.classes.weight, state["head.classification_head.cls_logits.weight"])
    assert from_torchvision(state).classes == ("class 1", "class 2", "class 3")
    with pytest.raises(CheckpointError, match="2 class names for 3 classes"):
        from_torchvision(state, ["a", "b"])


def test_names_from_before_torchvision_0_13():
    new = to_torchvision(small("retinanet", tower_norm="none"))
    old = {
        key.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "fpn" in key else key: value
        for key, value in new.items()
    }
    for i in range(4):
        for head in ("classification", "regression"):
            for kind in ("weight", "bias"):
                old[f"head.{head}_head.conv.{2 * i}.{kind}"] = old.pop(f"head.{head}_head.conv.{i}.0.{kind}")
    assert old.keys() != new.keys()
    mine, wanted = from_torchvision(old).state_dict(), from_torchvision(new).state_dict()
    assert all(torch.equal(mine[key], wanted[key]) for key in wanted)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "hub"


def test_published_weights_are_converted_once_and_kept(hub, monkeypatch):
    calls = []

    def fetched(weights, **options):
        assert options["weights_only"] and options["check_hash"]
        calls.append(weights.url)
        return detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fetched)
    detector = fpn.load("torchvision://fasterrcnn_mobilenet_v3_large_320_fpn")
    assert len(detector.classes) == 90 and detector.classes[0] == "person"
    assert detector.spec.sides == (320, 640) and detector.proposals == (2000, 150)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.modules())
    assert [file.name.split("-fpn-")[0] for file in (hub / "fpn").iterdir()] == [
        "fasterrcnn_mobilenet_v3_large_320_fpn-COCO_V1"
    ]
    fpn.load("torchvision:/fasterrcnn_mobilenet_v3_large_320_fpn")
    assert len(calls) == 1
    (kept,) = (hub / "fpn").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert is_detector(published("fasterrcnn_mobilenet_v3_large_320_fpn")) and len(calls) == 2


def test_another_file_under_a_published_name_is_refused(hub):
    file = hub / "checkpoints" / Path(detection.FCOS_ResNet50_FPN_Weights.COCO_V1.url).name
    file.parent.mkdir(parents=True)
    torch.save(to_torchvision(small("fcos")), file)
    with pytest.raises(CheckpointError, match=f"{file.name}: damaged, or another file .*; delete it"):
        fpn.load("torchvision://fcos_resnet50_fpn")
    assert not (hub / "fpn").exists()


def test_without_internet_the_address_is_told(hub, monkeypatch):
    def offline(weights, **_):
        raise URLError("no route")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    url = detection.FCOS_ResNet50_FPN_Weights.COCO_V1.url
    with pytest.raises(CheckpointError, match=f"no route.*Fetch {url} .* put it into .*checkpoints"):
        fpn.load("torchvision://fcos_resnet50_fpn")
    assert not hub.exists()
    with pytest.raises(CheckpointError, match="no such weights; there are fasterrcnn_resnet50_fpn, "):
        fpn.load("torchvision://fcos")

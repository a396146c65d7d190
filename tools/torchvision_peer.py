"""torchvision's Mask R-CNN R50-FPN, with the same work as ours in tools/benchmark.py. Needs PyTorch and torchvision.

On a GPU it runs with what makes it fastest there: TF32, channels last, autocast and cuDNN's choice by measurement.
"""

import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from config import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
torch.backends.cudnn.benchmark = True
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = True


def make_model(case, **options):
    """Makes the model: stem and first stage frozen, frozen batch norm, our number of classes and RPN settings."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    sizes = dict(min_size=min(case.size), max_size=max(*case.size, 1333))
    model = MaskRCNN(backbone, 81, **sizes, rpn_nms_thresh=case.proposal_iou, **options).to(DEVICE)
    return model.to(memory_format=torch.channels_last) if DEVICE == "cuda" else model


def autocast(case):
    """PyTorch's mixed precision, a context manager; without effect in float32.

    Raises:
        UserError: float16 on a CPU, in which the model does not train.
    """
    if case.precision == "float16" and DEVICE == "cpu":
        raise UserError("not in float16, which its model does not train in on a CPU")
    dtype = DTYPES.get(case.precision)
    return torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None)


def as_tensors(images):
    """Converts images, uint8 [N, H, W, 3] BGR, to a list of tensors, float32 [3, H, W] RGB in [0, 1]."""
    tensors = [torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float() / 255 for image in images]
    return [tensor.to(DEVICE) for tensor in tensors]


def wait():
    """Waits until the device has done its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def counter(work, name, count):
    """A hook of a module that sets work[name] = count(inputs, output) at each call of it."""

    def hook(module, inputs, output):
        work[name] = count(inputs, output)

    return hook


def prepare_inference(case, batch):
    """Prepares inference: from images to detections with pasted masks. Returns (run, work)."""
    model = make_model(case).eval()
    images, work = as_tensors(batch["image"]), {}
    heads = model.roi_heads

    def threshold(inputs, output):
        scores = output[0].float().softmax(dim=1)[:, 1:]
        return float(scores.flatten().sort().values[-case.candidates * case.batch]), len(scores) / case.batch

    def run():
        with torch.inference_mode(), autocast(case):
            found = model(images)
        wait()
        return found

    handle = heads.box_predictor.register_forward_hook(counter(work, "threshold", threshold))
    for _ in range(case.draws):
        draw_weights(model)
        heads.score_thresh = 1.0
        run()
        heads.score_thresh, work["num_rois"] = work.pop("threshold")
        if work["num_rois"] == model.rpn.post_nms_top_n():
            break
    handle.remove()
    work["num_detections"] = sum(len(one["scores"]) for one in run()) / case.batch
    return run, work


def prepare_training(case, batch):
    """Prepares training steps on one and the same batch: losses, gradients and the update. Returns (run, work)."""
    model = make_model(case, box_fg_iou_thresh=case.foreground_iou, box_bg_iou_thresh=case.foreground_iou).train()
    work = {}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler() if case.precision == "float16" else None
    images = as_tensors(batch["image"])
    targets = [
        {
            "boxes": torch.from_numpy(batch["gt_boxes"][i]).to(DEVICE),
            "labels": torch.from_numpy(batch["gt_labels"][i]).to(DEVICE),
            "masks": torch.from_numpy(batch["gt_masks"][i]).byte().to(DEVICE),
        }
        for i in range(case.batch)
    ]

    def forward():
        with autocast(case):
            return sum(model([image.clone() for image in images], targets).values())

    def run():
        cost = forward()
        optimizer.zero_grad()
        if scaler is None:
            cost.backward()
            optimizer.step()
        else:
            scaler.scale(cost).backward()
            scaler.step(optimizer)
            scaler.update()
        wait()

    heads = model.roi_heads
    handles = [
        heads.box_predictor.register_forward_hook(
            counter(work, "num_rois", lambda inputs, output: len(output[0]) / case.batch)
        ),
        heads.mask_predictor.register_forward_hook(
            counter(work, "num_foreground", lambda inputs, output: len(output) / case.batch)
        ),
    ]
    sampler = heads.fg_bg_sampler
    num_rois = sampler.batch_size_per_image
    for _ in range(case.draws):
        draw_weights(model)
        with torch.no_grad():
            forward()
        if work == {"num_rois": num_rois, "num_foreground": int(num_rois * sampler.positive_fraction)}:
            break
    for handle in handles:
        handle.remove()
    return run, work


def draw_weights(model):
    """Gives the RPN, which determines the proposals, other random weights."""
    for layer in model.rpn.head.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=0.01)


def peak_memory():
    """The peak of the memory that this process used on the GPU, in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


PREPARE = {"inference": prepare_inference, "training": prepare_training}

"""COCO's classes, for detectors of other frameworks trained on them: their files contain no names."""

NAMES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush""".replace("\n   ", "").split(", ")
)
LAST_ID = 90
# The category ids of NAMES, in their order.
IDS = tuple(i for i in range(1, LAST_ID + 1) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


def settings(num_classes: int) -> dict[str, object]:
    """The settings {key: value} of a detector of C = `num_classes` classes; with COCO's names if COCO has as many."""
    if num_classes == len(NAMES):
        return {"DATA.NUM_CATEGORY": num_classes, "DATA.CLASS_NAMES": ["BG", *NAMES]}
    return {"DATA.NUM_CATEGORY": num_classes}

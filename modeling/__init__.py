"""The models: `rcnn` composes what the other files define, one part each."""

"""The network: `rcnn` composes the parts that the other files define."""

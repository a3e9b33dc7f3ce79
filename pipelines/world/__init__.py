"""A small world of moving shapes whose truth is known.

A `Description` is what a caption says, a `Scene` fixes what it leaves open (sizes, places, speeds),
`render` draws scenes as video. `kinora-tiny` is trained on this world and `kinora.eval.world`
judges videos by it, so the quality of an acceleration can be measured exactly, without any other
model.
"""

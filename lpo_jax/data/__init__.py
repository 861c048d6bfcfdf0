"""From what people said about images to what a training step reads.

`sources` reads judgements, `lists` joins them into ranked lists, `cache` stores encoded
images, prompts and lists, `pipeline` packs them into batches, `prompts` reads prompt sets.
`builder` builds the lists of collections that outgrow one machine.
"""

"""`--input fast`: the images of timm's PIL transforms, with most of the work done on the device in batches.

A worker decodes only the rows of a JPEG that its random crop needs, with simplejpeg, and resizes the crop in uint8 with
SIMD (`decode`). It then calls timm's own augmentation policy, flips and random erasing with an `OpRecorder` in place of
an image: they draw the random numbers that they would draw for PIL, and the recorder notes each operation with its
parameters (`recorder`). Pixels and operations travel as a `DeferredBatch`, and `DeviceAugment` carries them out, each
operation once for all images of the batch that drew it, rounding as PIL does (`ops`). No library has PIL's operations
on a device, per image and to the bit: torchvision's and kornia's round, blur and interpolate in their own way, so
training would see other images.
"""

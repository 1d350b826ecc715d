// Cuts a step's attention into items, several for each thread where that is possible.
#pragma once

#include "engine.h"

namespace gemma {

// call: of any layer of the group.
void plan_attention(const AttentionCall& call, int threads, AttentionPlan& plan);

}  // namespace gemma

#!lua name=inferpipe_hooks_v1
-- Secrets of hooks. The keys stand at the top of redis_functions.lua.

-- hook_set: ws id present new -> 1 when it was `present` until now ('': there was none); new '' drops it
local function hook_set(keys, args)
  local key = keys[1] .. ':in:' .. args[1]
  if (redis.call('HGET', key, args[2]) or '') ~= args[3] then return 0 end
  if args[4] == '' then
    redis.call('HDEL', key, args[2])
  else
    redis.call('HSET', key, args[2], args[4])
  end
  return 1
end

redis.register_function('ip1_hook_set', hook_set)

#!lua name=inferpipe_tenants_v1
-- Idempotent answers. The keys stand at the top of redis_functions.lua; all are of the {config} slot.

-- once_begin: name body_hash claim hold_ms
-- -> {'yours'} | {'busy'} | {'conflict'} | {'done', answer}
local function once_begin(keys, args)
  local key = keys[1] .. ':once:' .. args[1]
  local h = redis.call('HMGET', key, 'body', 'claim', 'answer')
  if not h[1] then
    redis.call('HSET', key, 'body', args[2], 'claim', args[3])
    redis.call('PEXPIRE', key, args[4])
    return {'yours'}
  end
  if h[1] ~= args[2] then return {'conflict'} end
  if h[3] then return {'done', h[3]} end
  return {h[2] == args[3] and 'yours' or 'busy'}
end

-- once_finish: name claim answer ttl_ms -> 1 when the claim still held
local function once_finish(keys, args)
  local key = keys[1] .. ':once:' .. args[1]
  if redis.call('HGET', key, 'claim') ~= args[2] then return 0 end
  redis.call('HSET', key, 'answer', args[3])
  return redis.call('PEXPIRE', key, args[4])
end

-- once_drop: name claim -> 1 when a claim without an answer was given up
local function once_drop(keys, args)
  local key = keys[1] .. ':once:' .. args[1]
  local h = redis.call('HMGET', key, 'claim', 'answer')
  if h[1] ~= args[2] or h[2] then return 0 end
  return redis.call('DEL', key)
end

redis.register_function('ip1_once_begin', once_begin)
redis.register_function('ip1_once_finish', once_finish)
redis.register_function('ip1_once_drop', once_drop)
